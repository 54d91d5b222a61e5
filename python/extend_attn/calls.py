"""Repeated calls: what was checked and planned for one call is not checked and planned again for one like it.

A serving loop asks for the same thing in every layer and step, at other addresses and with other lengths. A call's
*signature* holds every fact that inputs.py looks at, and of lengths and addresses what those checks make of them (long
enough? aligned? is V a part of K?). So calls of one signature pass the same checks, and one of them passed them in
full. A new check of a new fact in inputs.py needs that fact here: tests/test_errors.py makes each bad call right after
a good one. Only calls that passed are remembered; one that no signature can be taken of is checked in full.

``Prepared`` is what is known of calls of one signature *and* one set of lengths. Nothing here holds a tensor.
"""

from __future__ import annotations

import os
from typing import Any, Dict, NamedTuple, Optional, Tuple

from . import inputs as _inputs
from .inputs import Inputs
from .plan.select import on_forget
from .plan.tables import ENVIRONMENT
from .plan.tile import Plan
from .problem import Problem

# Past one of these limits what is remembered is dropped and found anew. Scales and windows are part of a signature.
MAX_SIGNATURES = 512  # layers that differ x phases (prefill, decode, verify)
MAX_LENGTHS = 64  # of one signature


class Prepared:
    """One call's problem; then its plan (the default one, not one that a caller names) and what that launches."""

    __slots__ = ("plan", "problem", "recipe")

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.plan: Optional[Plan] = None
        self.recipe: Any = None


class _Known(NamedTuple):
    """What a signature stands for: a problem, the last fields of Inputs as they were resolved, calls by lengths."""

    problem: Problem
    scalars: tuple
    has_window: bool
    has_lse: bool
    prepared: Dict[tuple, Prepared]


_known: Dict[tuple, _Known] = {}


def forget() -> None:
    """Drops all that is remembered."""
    _known.clear()


on_forget(forget)


def two_stage(
    q_extend, k_extend, v_extend, o_extend, k_buffer, v_buffer, qo_indptr, kv_indptr, kv_indices, custom_mask,
    is_causal, mask_indptr, max_len_extend, k_scale, v_scale, sm_scale, logit_cap, skip_prefix_custom_mask,
    sliding_window_size, sinks, window_kv_offsets, xai_temperature_len, *, return_lse, q_positions, max_len_prefix,
) -> Tuple[Inputs, Prepared]:  # fmt: skip
    """The checked arguments of ``extend_attention_fwd`` and what is known of such a call; errors as in inputs.py."""
    signature, found = _repeated(
        False,
        (
            q_extend, k_extend, v_extend, o_extend, k_buffer, v_buffer, qo_indptr, kv_indptr, kv_indices, None,
            custom_mask, mask_indptr, sinks, window_kv_offsets, q_positions,
        ),
        max_len_extend,
        max_len_prefix,
        (
            is_causal, k_scale, v_scale, sm_scale, logit_cap, skip_prefix_custom_mask, sliding_window_size,
            xai_temperature_len, return_lse,
        ),
    )  # fmt: skip
    if found is not None:
        return found
    checked = _inputs.two_stage(
        q_extend, k_extend, v_extend, o_extend, k_buffer, v_buffer, qo_indptr, kv_indptr, kv_indices, custom_mask,
        is_causal, mask_indptr, max_len_extend, k_scale, v_scale, sm_scale, logit_cap, skip_prefix_custom_mask,
        sliding_window_size, sinks, window_kv_offsets, xai_temperature_len,
        return_lse=return_lse, q_positions=q_positions, max_len_prefix=max_len_prefix,
    )  # fmt: skip
    return checked, _first(signature, checked)


def unified(
    q, o, k_buffer, v_buffer, k_scale, v_scale, qo_indptr, kv_indptr, kv_indices, prefix_lens, max_len_extend,
    custom_mask, mask_indptr, sm_scale, logit_cap, is_causal, sliding_window_size, sinks, window_start_pos,
    xai_temperature_len, *, return_lse, q_positions, max_len_prefix,
) -> Tuple[Inputs, Prepared]:  # fmt: skip
    """The same of ``extend_attention_fwd_unified``."""
    signature, found = _repeated(
        True,
        (
            q, None, None, o, k_buffer, v_buffer, qo_indptr, kv_indptr, kv_indices, prefix_lens, custom_mask,
            mask_indptr, sinks, window_start_pos, q_positions,
        ),
        max_len_extend,
        max_len_prefix,
        (is_causal, k_scale, v_scale, sm_scale, logit_cap, sliding_window_size, xai_temperature_len, return_lse),
    )  # fmt: skip
    if found is not None:
        return found
    checked = _inputs.unified(
        q, o, k_buffer, v_buffer, k_scale, v_scale, qo_indptr, kv_indptr, kv_indices, prefix_lens, max_len_extend,
        custom_mask, mask_indptr, sm_scale, logit_cap, is_causal, sliding_window_size, sinks, window_start_pos,
        xai_temperature_len, return_lse=return_lse, q_positions=q_positions, max_len_prefix=max_len_prefix,
    )  # fmt: skip
    return checked, _first(signature, checked)


def _first(signature: Optional[tuple], checked: Inputs) -> Prepared:
    """The problem of a call that was checked in full, which is remembered."""
    problem = checked.problem()
    prepared = Prepared(problem)
    # -0.0 == 0.0, so a signature can't tell these two scales apart; they are not worth a place in it
    if signature is not None and checked.v_scale != 0:
        if len(_known) >= MAX_SIGNATURES:
            _known.clear()
        scalars = checked[Inputs._fields.index("sm_scale") :]
        lengths = (
            problem.batch_size, problem.num_tokens, problem.max_len_extend, problem.num_kv_indices,
            problem.max_len_prefix, os.environ.get(ENVIRONMENT),
        )  # fmt: skip
        has_window, has_lse = checked.sliding_window > 0, checked.lse is not None
        _known[signature] = _Known(problem, scalars, has_window, has_lse, {lengths: prepared})
    return prepared


def _repeated(
    is_unified: bool, tensors: tuple, max_len_extend: Any, max_len_prefix: Any, scalars: tuple
) -> Tuple[Optional[tuple], Optional[Tuple[Inputs, Prepared]]]:
    """(the call's signature, None where none can be taken; the call, None unless one of its signature passed before).

    ``tensors`` are unchecked, in the order of Inputs. No check is made here, and nothing on the device is touched.
    """
    (
        q, k_new, v_new, o, k_pool, v_pool, qo_indptr, kv_indptr, kv_indices, prefix_lens, mask, mask_indptr, sinks,
        offsets, q_positions,
    ) = tensors  # fmt: skip
    if type(max_len_extend) is not int or max_len_extend < 0:
        return None, None
    if max_len_prefix is not None and (type(max_len_prefix) is not int or max_len_prefix < 0):
        return None, None
    try:
        num_tokens, num_heads, _ = q.shape
        batch_size = qo_indptr.shape[0] - 1
        num_indices = kv_indices.shape[0]
        address = q.data_ptr() | o.data_ptr()
        new = pool = None
        if not is_unified:
            k_address, v_address = k_new.data_ptr(), v_new.data_ptr()
            address |= k_address | v_address
            new = (_rows(k_new), _rows(v_new), k_address == v_address)
        if is_unified or num_indices:
            k_address, v_address = k_pool.data_ptr(), v_pool.data_ptr()
            address |= k_address | v_address
            pool = (_rows(k_pool), _rows(v_pool), k_address == v_address, k_pool.shape[0] == v_pool.shape[0])
        signature = (
            is_unified,
            _rows(q),
            _rows(o),
            new,
            pool,
            address & 15,
            _vector(qo_indptr, 1),
            _vector(kv_indptr, batch_size + 1),
            _vector(kv_indices, 0),
            None if prefix_lens is None else _vector(prefix_lens, batch_size),
            None if mask is None else (_vector(mask, 0), _vector(mask_indptr, batch_size + 1)),
            None if sinks is None else _vector(sinks, num_heads),
            None if offsets is None else _vector(offsets, batch_size),
            None if q_positions is None else _vector(q_positions, 0),
            *map(type, scalars),  # before the values: 1 == 1.0 == True, and an odd type's == must not be called
            *scalars,
        )
        known = _known.get(signature)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None, None  # something that is no tensor, has not these dimensions, cannot be hashed
    if known is None:
        return signature, None

    if pool is None:
        k_pool = v_pool = None
    checked = Inputs._make((
        q, k_new, v_new, o, k_pool, v_pool, qo_indptr, kv_indptr, kv_indices, prefix_lens, mask,
        None if mask is None else mask_indptr, sinks, offsets if known.has_window else None, q_positions,
        _inputs.empty_lse(q) if known.has_lse else None, batch_size, max_len_extend, max_len_prefix, *known.scalars,
    ))  # fmt: skip
    lengths = (batch_size, num_tokens, max_len_extend, num_indices, max_len_prefix, os.environ.get(ENVIRONMENT))
    prepared = known.prepared.get(lengths)
    if prepared is None:
        prepared = Prepared(_with_lengths(known.problem, *lengths[:-1]))
        if len(known.prepared) >= MAX_LENGTHS:
            known.prepared.clear()
        known.prepared[lengths] = prepared
    return signature, (checked, prepared)


def _rows(t: Any) -> tuple:
    """What checks look at in a [rows, heads, dim] tensor, its address apart."""
    rows, heads, dim = t.shape
    return type(t), t.dtype, t.device, heads, dim, t.stride(), rows if rows < 2 else 2


def _vector(t: Any, needed: int) -> tuple:
    """What checks look at in a 1-D tensor that needs so many elements."""
    (length,) = t.shape
    return type(t), t.dtype, t.device, t.is_contiguous(), length >= needed


def _with_lengths(
    problem: Problem, batch_size: int, num_tokens: int, max_len_extend: int, num_indices: int, max_len_prefix: Any
) -> Problem:
    """``dataclasses.replace`` without its checks, a third of a call's time: these are lengths of tensors, and bounds
    that were looked at above."""
    new = object.__new__(Problem)
    new.__dict__.update(
        problem.__dict__,
        batch_size=batch_size,
        num_tokens=num_tokens,
        max_len_extend=max_len_extend,
        num_kv_indices=num_indices,
        max_len_prefix=max_len_prefix,
    )
    return new
