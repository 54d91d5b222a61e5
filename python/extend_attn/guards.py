"""Calls recognised by one question to torch: the check that its compiler makes before it runs compiled code again.

``TensorGuards`` compares type, dtype, device, strides and sizes of all tensors in one call, 1 us instead of the 5 that
asking for each fact takes. It is torch's own and may change: where it is missing or refuses, calls are recognised by
their signatures (calls.py), which know every fact. A guard is stricter than a signature and never wider: what it says
no to is looked at there.
"""

from __future__ import annotations

from typing import Any, Callable, List, Optional, Tuple

import torch

from .inputs import ALIGNMENT, NUM_ROW_TENSORS, Inputs

try:
    _TensorGuards: Any = torch._C._dynamo.guards.TensorGuards
except AttributeError:
    _TensorGuards = None


class Guard:
    """``check(*tensors)``: are these like the tensors it was made of, but for rows and lengths?

    The pool's rows count (they do not change in an engine), and so do the sinks. What a guard says nothing about, and
    the caller looks at: addresses, and whether index arrays are long enough.
    """

    __slots__ = ("check", "known", "has_pool", "v_is_k_new", "v_is_k_pool")

    def __init__(self, check: Callable[..., bool], known: Any, checked: Inputs) -> None:
        self.check, self.known = check, known
        self.has_pool = checked.k_pool is not None
        self.v_is_k_new = _same_address(checked.k_new, checked.v_new)
        self.v_is_k_pool = _same_address(checked.k_pool, checked.v_pool)


def guard_of(tensors: Tuple[Optional[torch.Tensor], ...], checked: Inputs, known: Any) -> Optional[Guard]:
    """A guard for calls like this one, whose ``tensors`` (unchecked, in the order of Inputs) became ``checked``.

    None if a fact depends on more than a guard sees: an alignment on the number of rows, or on addresses.
    """
    if _TensorGuards is None:
        return None
    for t in checked[:NUM_ROW_TENSORS]:
        if t is not None and not _aligned(t):
            return None
    present: List[torch.Tensor] = []
    sizes: List[List[Optional[int]]] = []
    for i, t in enumerate(tensors):
        if t is None:
            continue
        present.append(t)
        fixed = i in _FIXED_ROWS
        sizes.append([size if d or fixed else None for d, size in enumerate(t.shape)])
    strides = [list(t.stride()) for t in present]
    try:
        guards = _TensorGuards(*present, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        return Guard(guards.check, known, checked) if guards.check(*present) else None
    except (TypeError, ValueError, RuntimeError):  # another torch's
        return None


_FIXED_ROWS = tuple(Inputs._fields.index(name) for name in ("k_pool", "v_pool", "sinks"))


def _aligned(t: torch.Tensor) -> bool:
    """Whether every row and head starts at a multiple of ALIGNMENT bytes, however many there are."""
    bits = t.data_ptr() | t.stride(0) * t.element_size()
    if t.shape[1] > 1:
        bits |= t.stride(1) * t.element_size()
    return bits % ALIGNMENT == 0


def _same_address(k: Optional[torch.Tensor], v: Optional[torch.Tensor]) -> bool:
    return k is not None and v is not None and k.data_ptr() == v.data_ptr()
