"""Repeated calls: what was checked and planned for one call is not checked and planned again for one like it.

A serving loop asks for the same thing in every layer and step, at other addresses and with other lengths. A call's
*signature* holds every fact that inputs.py looks at, and of lengths and addresses what those checks make of them (long
enough? aligned? is V a part of K?). So calls of one signature pass the same checks, and one of them passed them in
full. A new check of a new fact in inputs.py needs that fact here: tests/test_errors.py makes each bad call right after
a good one. Only calls that passed are remembered; one that no signature can be taken of is checked in full.

``Prepared`` is what is known of calls of one signature *and* one set of lengths that ask for the same plan (most for
none), down to its kernels, which then need nothing but the call's addresses. Nothing here holds a tensor.
"""

from __future__ import annotations

import os
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch

from . import inputs as _inputs
from .guards import Guard, guard_of
from .inputs import ALIGNMENT, Inputs
from .plan.select import PlanLike, TileLike, frozen, on_forget
from .plan.tables import ENVIRONMENT
from .plan.tile import Plan
from .problem import Problem

# Past one of these limits what is remembered is dropped and found anew. Scales and windows are part of a signature.
MAX_SIGNATURES = 512  # layers that differ x phases (prefill, decode, verify)
MAX_LENGTHS = 64  # of one signature, each with each plan that is asked for
MAX_GUARDS = 4  # of calls that differ in tensors alone; each takes 1 us to ask


class Prepared:
    """One call's problem; then its plan once it is found to be legal, what that launches, and those kernels bound to
    all but addresses (kernels/bound.py; False where they can't be)."""

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
    """What a signature stands for: a problem, the last fields of Inputs as they were resolved, calls by lengths and
    plan asked for."""

    problem: Problem
    scalars: tuple
    has_window: bool
    has_lse: bool
    prepared: Dict[tuple, Prepared]


_known: Dict[tuple, _Known] = {}
_guards: Dict[tuple, List[Guard]] = {}

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
    _guards.clear()


on_forget(forget)


class Likeness(NamedTuple):
    """What a call that passes is remembered by: its signature, its kind, which leads to guards, the plan asked for."""

    signature: tuple
    kind: tuple
    tensors: tuple
    asked: Optional[tuple]


def first(likeness: Optional[Likeness], checked: Inputs) -> Call:
    """A call that was checked in full; it is remembered unless there is nothing to remember it by."""
    problem = checked.problem()
    prepared = Prepared(problem)
    # -0.0 == 0.0, so a signature can't tell these two scales apart; they are not worth a place in it
    if likeness is not None and checked.v_scale != 0:
        if len(_known) >= MAX_SIGNATURES:
            forget()
        scalars = checked[Inputs._fields.index("sm_scale") :]
        lengths = (
            problem.batch_size, problem.num_tokens, problem.max_len_extend, problem.num_kv_indices,
            problem.max_len_prefix, _slots(checked.k_pool), _table_in_environment(_TABLE), likeness.asked,
        )  # fmt: skip
        has_window, has_lse = checked.sliding_window > 0, checked.lse is not None
        known = _Known(problem, scalars, has_window, has_lse, {lengths: prepared})
        _known[likeness.signature] = known
        _add_guard(likeness.kind, likeness.tensors, checked, known)
    return prepared, checked, None, checked.lse


def repeated(
    is_unified: bool,
    tensors: tuple,
    max_len_extend: Any,
    max_len_prefix: Any,
    scalars: tuple,
    plan: PlanLike,
    tile: TileLike,
    check: bool,
) -> Tuple[Optional[Likeness], Optional[Call]]:
    """(what ``first`` remembers the call by, None if by nothing; the call, None unless one like it passed before).

    ``tensors`` are unchecked, in the order of Inputs; ``scalars`` are all other arguments that are checked, the same
    ones in each call of a function. ``plan`` and ``tile`` are unchecked too: one that is not legal has no bound call.
    ``check``: the contents of tensors will be looked at, so that addresses are not enough. No check is made here, and
    nothing on the device is touched.
    """
    if type(max_len_extend) is not int or max_len_extend < 0:
        return None, None
    if max_len_prefix is not None and (type(max_len_prefix) is not int or max_len_prefix < 0):
        return None, None
    (
        q, k_new, v_new, _, _, _, qo_indptr, kv_indptr, kv_indices, prefix_lens, mask, mask_indptr, sinks, offsets,
        q_positions,
    ) = tensors  # fmt: skip
    known: Optional[_Known] = None
    guard = asked = None
    try:
        if plan is not None or tile is not None:
            asked = (frozen(plan), frozen(tile))
        alone = prefix_lens is mask is mask_indptr is sinks is offsets is q_positions is None
        there = None if alone else tuple([t is None for t in tensors])
        # types before values: 1 == 1.0 == True, and an odd type's == must not be called
        kind = (there, *map(type, scalars), scalars)
        guards = _guards.get(kind)
        if guards is not None:
            present = tensors[:_NUM_ALONE] if alone else [t for t in tensors if t is not None]
            for guard in guards:
                if guard.check(*present):
                    sizes = _sizes_if_like(guard, is_unified, tensors)
                    if sizes is not None:
                        known = guard.known
                        break
        if known is None:
            sizes, facts = _facts(is_unified, tensors)
            signature = (is_unified, *facts, *kind)
            known = _known.get(signature)
            if known is None:
                return Likeness(signature, kind, tensors, asked), None
            guard = None  # a new one is worth its while
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None, None  # something that is no tensor, has not these dimensions, cannot be hashed

    num_tokens, batch_size, num_indices, at = sizes
    slots = tensors[4].shape[0] if is_unified or num_indices else 0
    lengths = (
        batch_size, num_tokens, max_len_extend, num_indices, max_len_prefix, slots, _table_in_environment(_TABLE),
        asked,
    )  # fmt: skip
    prepared = known.prepared.get(lengths)
    if prepared is None:
        prepared = Prepared(_with_lengths(known.problem, *lengths[:_NUM_LENGTHS]))
        if len(known.prepared) >= MAX_LENGTHS:
            known.prepared.clear()
        known.prepared[lengths] = prepared
    lse = _inputs.empty_lse(q) if known.has_lse else None
    others: tuple = _NO_OTHERS
    others_at: Any = _NO_OTHERS
    if lse is not None or not alone:
        others = (
            prefix_lens, mask, None if mask is None else mask_indptr, sinks, offsets if known.has_window else None,
            q_positions, lse,
        )  # fmt: skip
        others_at = [None if t is None else t.data_ptr() for t in others]
    bound = prepared.bound
    k_rows = v_rows = None
    if k_new is not None and (not bound or bound.needs_rows):
        k_rows, v_rows = k_new.shape[0], v_new.shape[0]
    addresses = (
        *at, qo_indptr.data_ptr(), kv_indptr.data_ptr(), kv_indices.data_ptr(), *others_at, k_rows, v_rows, None,
    )  # fmt: skip
    if bound and not check and bound.ready():
        return None, (prepared, None, addresses, lse)
    pool = tensors[4:6] if is_unified or num_indices else (None, None)
    checked = Inputs._make((
        *tensors[:4], *pool, qo_indptr, kv_indptr, kv_indices, *others, batch_size, max_len_extend, max_len_prefix,
        *known.scalars,
    ))  # fmt: skip
    if guard is None:
        _add_guard(kind, tensors, checked, known)
    return None, (prepared, checked, addresses, lse)


_NUM_ALONE = 9  # tensors up to kv_indices
_NUM_LENGTHS = 5  # of a call's lengths those that are the problem's; kernels also hold prefetches within the pool


def _slots(pool: Optional[torch.Tensor]) -> int:
    return 0 if pool is None else pool.shape[0]


_Sizes = Tuple[int, int, int, tuple]  # rows of q, sequences, elements of kv_indices, addresses of the row tensors


def _sizes_if_like(guard: Guard, is_unified: bool, tensors: tuple) -> Optional[_Sizes]:
    """The sizes of a call that passed the guard's check, if what that does not see is alike as well."""
    q, k_new, v_new, o, k_pool, v_pool, qo_indptr, kv_indptr, kv_indices = tensors[:_NUM_ALONE]
    batch_size = qo_indptr.shape[0] - 1
    if not 0 <= batch_size < kv_indptr.shape[0]:
        return None
    num_indices = kv_indices.shape[0]
    q_at, o_at = q.data_ptr(), o.data_ptr()
    bits = q_at | o_at
    k_at = v_at = k_pool_at = v_pool_at = None
    if not is_unified:
        if (num_indices > 0) != guard.has_pool:
            return None
        k_at, v_at = k_new.data_ptr(), v_new.data_ptr()
        bits |= k_at | v_at
        if (k_at == v_at) != guard.v_is_k_new:
            return None
    if guard.has_pool:
        k_pool_at, v_pool_at = k_pool.data_ptr(), v_pool.data_ptr()
        bits |= k_pool_at | v_pool_at
        if (k_pool_at == v_pool_at) != guard.v_is_k_pool:
            return None
    if bits % ALIGNMENT:
        return None
    prefix_lens, _, mask_indptr, _, offsets, _ = tensors[_NUM_ALONE:]
    if prefix_lens is mask_indptr is offsets is None:
        pass
    elif any(t is not None and t.shape[0] < batch_size for t in (prefix_lens, offsets)):
        return None
    elif mask_indptr is not None and mask_indptr.shape[0] <= batch_size:
        return None
    return q.shape[0], batch_size, num_indices, (q_at, k_at, v_at, o_at, k_pool_at, v_pool_at)


def _facts(is_unified: bool, tensors: tuple) -> Tuple[_Sizes, tuple]:
    """(sizes, every fact of the tensors that checks look at). Raises for what is no tensor of these dimensions."""
    (
        q, k_new, v_new, o, k_pool, v_pool, qo_indptr, kv_indptr, kv_indices, prefix_lens, mask, mask_indptr, sinks,
        offsets, q_positions,
    ) = tensors  # fmt: skip
    new = pool = more = None
    k_at = v_at = k_pool_at = v_pool_at = None
    num_tokens, q_facts = _rows(q)
    _, o_facts = _rows(o)
    q_at, o_at = q.data_ptr(), o.data_ptr()
    bits = q_at | o_at
    batch_size, qo_facts = _vector(qo_indptr)
    batch_size -= 1
    num_indptr, kv_facts = _vector(kv_indptr)
    num_indices, index_facts = _vector(kv_indices)
    if not is_unified:
        (_, k_facts), (_, v_facts) = _rows(k_new), _rows(v_new)
        k_at, v_at = k_new.data_ptr(), v_new.data_ptr()
        bits |= k_at | v_at
        new = (k_facts, v_facts, k_at == v_at)
    if is_unified or num_indices:
        (num_slots, k_facts), (num_values, v_facts) = _rows(k_pool), _rows(v_pool)
        k_pool_at, v_pool_at = k_pool.data_ptr(), v_pool.data_ptr()
        bits |= k_pool_at | v_pool_at
        pool = (k_facts, v_facts, k_pool_at == v_pool_at, num_slots == num_values)
    at = (q_at, k_at, v_at, o_at, k_pool_at, v_pool_at)
    if bits % ALIGNMENT:  # kernels are specialised for the alignment of each
        more = (bits % ALIGNMENT, *[a is not None and a % ALIGNMENT == 0 for a in at])
    if q_facts[2] < 0:  # not a GPU: the CPU's tensors and those without memory look alike so far
        more = (more, *[t.device for t in tensors if t is not None])
    facts = (
        q_facts, o_facts, new, pool, more, qo_facts, kv_facts, index_facts, batch_size >= 0, num_indptr > batch_size,
        prefix_lens is not None and _vector_of(prefix_lens, batch_size),
        mask is not None and (_vector_of(mask, 0), _vector_of(mask_indptr, batch_size + 1)),
        sinks is not None and _vector_of(sinks, q_facts[3]),
        offsets is not None and _vector_of(offsets, batch_size),
        q_positions is not None and _vector_of(q_positions, 0),
    )  # fmt: skip
    return (num_tokens, batch_size, num_indices, at), facts


def _add_guard(kind: tuple, tensors: tuple, checked: Inputs, known: _Known) -> None:
    """Remembers how calls like this one are recognised at once; the newest first, since that is what goes on."""
    guard = guard_of(tensors, checked, known)
    if guard is not None:
        if len(_guards) >= MAX_SIGNATURES:
            _guards.clear()
        _guards[kind] = [guard, *_guards.get(kind, [])][:MAX_GUARDS]


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
