"""Repeated calls: what was checked and planned for one call is not checked and planned again for one like it.

A serving loop asks for the same thing in every layer and step, at other addresses and with other lengths. A call's
*signature* holds every fact that inputs.py looks at, and of lengths and addresses what those checks make of them (long
enough? aligned? is V a part of K?). So calls of one signature pass the same checks, and one of them passed them in
full. A new check of a new fact in inputs.py needs that fact here: tests/test_errors.py makes each bad call right after
a good one. Only calls that passed are remembered; one that no signature can be taken of is checked in full.

``Prepared`` is what is known of calls of one signature *and* one set of lengths, down to its kernels, which then need
nothing but the call's addresses. Nothing here holds a tensor.
"""

from __future__ import annotations

import os
from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch

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
    """One call's problem; then its plan (the default one, not one that a caller names), what that launches, and those
    kernels bound to all but addresses (kernels/bound.py; False where they can't be)."""

    __slots__ = ("bound", "plan", "problem", "recipe")

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.plan: Optional[Plan] = None
        self.recipe: Any = None
        self.bound: Any = None


# A call that passed: what is known of it, its arguments, its addresses (of the tensors of Inputs in their order, then
# the rows of k_new and v_new, then None), its LSE. The first of its signature has no addresses; one that
# ``prepared.bound`` runs has no more than them.
Call = Tuple[Prepared, Optional[Inputs], Optional[tuple], Optional[torch.Tensor]]


class _Known(NamedTuple):
    """What a signature stands for: a problem, the last fields of Inputs as they were resolved, calls by lengths."""

    problem: Problem
    scalars: tuple
    has_window: bool
    has_lse: bool
    prepared: Dict[tuple, Prepared]


_known: Dict[tuple, _Known] = {}

# prefix_lens to lse of Inputs: most calls have none of them
_NO_OTHERS = (None,) * 7

# The user's table belongs to what a call was planned from. os.environ raises and catches an error for a name that is
# not set, which takes 1 us; the dict beneath it does not.
_environ: Any = os.environ
_TABLE = _environ.encodekey(ENVIRONMENT) if hasattr(_environ, "_data") else ENVIRONMENT
_table_in_environment = getattr(_environ, "_data", _environ).get


def forget() -> None:
    """Drops all that is remembered."""
    _known.clear()


on_forget(forget)


def first(signature: Optional[tuple], checked: Inputs) -> Call:
    """A call that was checked in full, which is remembered under its signature (None: not)."""
    problem = checked.problem()
    prepared = Prepared(problem)
    # -0.0 == 0.0, so a signature can't tell these two scales apart; they are not worth a place in it
    if signature is not None and checked.v_scale != 0:
        if len(_known) >= MAX_SIGNATURES:
            _known.clear()
        scalars = checked[Inputs._fields.index("sm_scale") :]
        lengths = (
            problem.batch_size, problem.num_tokens, problem.max_len_extend, problem.num_kv_indices,
            problem.max_len_prefix, _table_in_environment(_TABLE),
        )  # fmt: skip
        has_window, has_lse = checked.sliding_window > 0, checked.lse is not None
        _known[signature] = _Known(problem, scalars, has_window, has_lse, {lengths: prepared})
    return prepared, checked, None, checked.lse


def repeated(
    is_unified: bool, tensors: tuple, max_len_extend: Any, max_len_prefix: Any, scalars: tuple, launchable: bool
) -> Tuple[Optional[tuple], Optional[Call]]:
    """(the call's signature, None where none can be taken; the call, None unless one of its signature passed before).

    ``tensors`` are unchecked, in the order of Inputs; ``scalars`` are all other arguments that are checked, the same
    ones in each call of a function. ``launchable``: nothing but the default plan is asked for, so that a bound call
    needs no more than addresses. No check is made here, and nothing on the device is touched.
    """
    (
        q, k_new, v_new, o, k_pool, v_pool, qo_indptr, kv_indptr, kv_indices, prefix_lens, mask, mask_indptr, sinks,
        offsets, q_positions,
    ) = tensors  # fmt: skip
    if type(max_len_extend) is not int or max_len_extend < 0:
        return None, None
    if max_len_prefix is not None and (type(max_len_prefix) is not int or max_len_prefix < 0):
        return None, None
    new = pool = more = None
    k_rows = v_rows = k_at = v_at = k_pool_at = v_pool_at = None
    try:
        num_tokens, q_facts = _rows(q)
        _, o_facts = _rows(o)
        q_at, o_at = q.data_ptr(), o.data_ptr()
        bits = q_at | o_at
        batch_size, qo_facts = _vector(qo_indptr)
        batch_size -= 1
        num_indptr, kv_facts = _vector(kv_indptr)
        num_indices, index_facts = _vector(kv_indices)
        if not is_unified:
            k_rows, k_facts = _rows(k_new)
            v_rows, v_facts = _rows(v_new)
            k_at, v_at = k_new.data_ptr(), v_new.data_ptr()
            bits |= k_at | v_at
            new = (k_facts, v_facts, k_at == v_at)
        if is_unified or num_indices:
            num_slots, k_facts = _rows(k_pool)
            num_values, v_facts = _rows(v_pool)
            k_pool_at, v_pool_at = k_pool.data_ptr(), v_pool.data_ptr()
            bits |= k_pool_at | v_pool_at
            pool = (k_facts, v_facts, k_pool_at == v_pool_at, num_slots == num_values)
        if bits & 15:  # kernels are specialised for the alignment of each
            more = [at is not None and at & 15 == 0 for at in (q_at, k_at, v_at, o_at, k_pool_at, v_pool_at)]
            more = (bits & 15, *more)
        if q_facts[2] < 0:  # not a GPU: the CPU's tensors and those without memory look alike so far
            more = (more, *[t.device for t in tensors if t is not None])
        signature = (
            is_unified, q_facts, o_facts, new, pool, more, qo_facts, kv_facts, index_facts, batch_size >= 0,
            num_indptr > batch_size,
            prefix_lens is not None and _vector_of(prefix_lens, batch_size),
            mask is not None and (_vector_of(mask, 0), _vector_of(mask_indptr, batch_size + 1)),
            sinks is not None and _vector_of(sinks, q_facts[3]),
            offsets is not None and _vector_of(offsets, batch_size),
            q_positions is not None and _vector_of(q_positions, 0),
            *map(type, scalars),  # before the values: 1 == 1.0 == True, and an odd type's == must not be called
            scalars,
        )  # fmt: skip
        known = _known.get(signature)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None, None  # something that is no tensor, has not these dimensions, cannot be hashed
    if known is None:
        return signature, None

    lengths = (batch_size, num_tokens, max_len_extend, num_indices, max_len_prefix, _table_in_environment(_TABLE))
    prepared = known.prepared.get(lengths)
    if prepared is None:
        prepared = Prepared(_with_lengths(known.problem, *lengths[:-1]))
        if len(known.prepared) >= MAX_LENGTHS:
            known.prepared.clear()
        known.prepared[lengths] = prepared
    lse = _inputs.empty_lse(q) if known.has_lse else None
    if prefix_lens is mask is sinks is offsets is q_positions is lse:  # all None, since lse is new
        others: tuple = _NO_OTHERS
        at: Any = _NO_OTHERS
    else:
        others = (
            prefix_lens, mask, None if mask is None else mask_indptr, sinks, offsets if known.has_window else None,
            q_positions, lse,
        )  # fmt: skip
        at = [None if t is None else t.data_ptr() for t in others]
    addresses = (
        q_at, k_at, v_at, o_at, k_pool_at, v_pool_at, qo_indptr.data_ptr(), kv_indptr.data_ptr(),
        kv_indices.data_ptr(), *at, k_rows, v_rows, None,
    )  # fmt: skip
    bound = prepared.bound
    if launchable and bound and bound.ready():
        return signature, (prepared, None, addresses, lse)
    if pool is None:
        k_pool = v_pool = None
    checked = Inputs._make((
        q, k_new, v_new, o, k_pool, v_pool, qo_indptr, kv_indptr, kv_indices, *others, batch_size, max_len_extend,
        max_len_prefix, *known.scalars,
    ))  # fmt: skip
    return signature, (prepared, checked, addresses, lse)


def _rows(t: Any) -> Tuple[int, tuple]:
    """(rows, what checks look at) of a [rows, heads, dim] tensor, its address apart. On GPUs the device is a number:
    no process has two kinds of them."""
    rows, heads, dim = t.shape
    return rows, (type(t), t.dtype, t.get_device(), heads, dim, t.stride(), rows if rows < 2 else 2)


def _vector(t: Any) -> Tuple[int, tuple]:
    """(elements, what checks look at) of a 1-D tensor."""
    (length,) = t.shape
    return length, (type(t), t.dtype, t.get_device(), t.is_contiguous())


def _vector_of(t: Any, needed: int) -> tuple:
    """The facts of a 1-D tensor that needs so many elements."""
    length, facts = _vector(t)
    return length >= needed, facts


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
