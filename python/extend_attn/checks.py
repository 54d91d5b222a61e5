"""``check=True``: the contents of index arrays, verified on the device before anything reads through them.

Eager, the result is read back (a synchronisation) and a bad element raises ValueError. Under capture nothing may be
read back: each captured call keeps its report on the device, a replay with a bad element writes no output, and
``last_error()`` reads the reports later.
"""

from __future__ import annotations

import dataclasses
from typing import List, Optional, Tuple

import torch

from .inputs import Inputs

_OK = -1


@dataclasses.dataclass(frozen=True)
class _Report:
    """One captured call's verdicts: ``found`` [checks, 2] int64 on the device (first bad index or -1, its value)."""

    rules: Tuple[Tuple[str, str], ...]
    found: torch.Tensor

    def message(self) -> Optional[str]:
        for (name, rule), (index, value) in zip(self.rules, self.found.tolist()):
            if index != _OK:
                return f"{name}: element {index} is {value}; {rule}"
        return None


_captured: List[_Report] = []


def verify(inputs: Inputs) -> Inputs:
    """Checks every index array of a call. Eager: raises ValueError naming the argument and its first bad element.

    Under capture: records the report and returns inputs whose ``qo_indptr`` is zeroed by the device when a check
    fails, so that the kernels then touch nothing.
    """
    report = _examine(inputs)
    if inputs.q.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(report)
        ok = (report.found[:, 0] == _OK).all()
        return inputs._replace(qo_indptr=inputs.qo_indptr * ok)
    message = report.message()
    if message is not None:
        raise ValueError(message)
    return inputs


def last_error() -> Optional[str]:
    """What the newest captured ``check=True`` call with a bad index found in its last replay, or None.

    Synchronises with the device. Eager calls raise instead and leave nothing here.
    """
    for report in reversed(_captured):
        message = report.message()
        if message is not None:
            return message
    return None


def _examine(i: Inputs) -> _Report:
    rules: List[Tuple[str, str]] = []
    found: List[torch.Tensor] = []

    def require(name: str, good: torch.Tensor, values: torch.Tensor, rule: str) -> None:
        """Every element of ``good`` must hold; ``values`` are what the message shows."""
        if good.numel() == 0:
            return
        bad = (~good).to(torch.int8)
        first = bad.argmax(dim=0, keepdim=True)
        index = torch.where(bad.any(), first, torch.full_like(first, _OK))
        rules.append((name, rule))
        found.append(torch.cat([index, values.to(torch.int64).gather(0, first)]))  # values[first] would synchronise

    batch = i.batch_size
    starts = i.qo_indptr.to(torch.int64)
    kv_starts = i.kv_indptr[: batch + 1].to(torch.int64)
    extend = starts.diff()
    keys = kv_starts.diff()
    rows = min(t.shape[0] for t in (i.q, i.o, i.k_new, i.v_new) if t is not None)
    named = {"q": "q", "k_new": "k", "v_new": "v", "o": "o"}
    shortest = min(named, key=lambda n: getattr(i, n).shape[0] if getattr(i, n) is not None else rows + 1)
    require("qo_indptr", starts >= 0, starts, "it must not be negative")
    require("qo_indptr", starts[1:] >= starts[:-1], starts[1:], "it must not decrease (index counted from the second)")
    require("qo_indptr", starts <= rows, starts, f"{named[shortest]} has only {rows} rows")
    require("max_len_extend", extend <= i.max_len_extend, extend, f"max_len_extend is only {i.max_len_extend}")
    require("kv_indptr", kv_starts >= 0, kv_starts, "it must not be negative")
    require("kv_indptr", keys >= 0, kv_starts[1:], "it must not decrease (index counted from the second)")
    length = i.kv_indices.numel()
    require("kv_indptr", kv_starts <= length, kv_starts, f"kv_indices has only {length} elements")
    if i.k_pool is not None:
        slots = i.k_pool.shape[0]
        position = torch.arange(length, device=i.q.device)
        used = (position >= kv_starts[0]) & (position < kv_starts[-1])
        inside = (i.kv_indices >= 0) & (i.kv_indices < slots)
        require("kv_indices", inside | ~used, i.kv_indices, f"the pool has slots 0 to {slots - 1}")
    prefix = keys
    if i.prefix_lens is not None:
        prefix = i.prefix_lens[:batch].to(torch.int64)
        require("prefix_lens", prefix >= 0, prefix, "it must not be negative")
        require("prefix_lens", prefix + extend == keys, prefix, "prefix and new tokens must add up to kv_indptr's keys")
    cut = torch.zeros_like(prefix)
    if i.window_offsets is not None:
        name = "window_start_pos" if i.unified else "window_kv_offsets"
        cut = i.window_offsets[:batch].to(torch.int64)
        require(name, cut >= 0, cut, "it must not be negative")
    if i.custom_mask is not None:
        assert i.mask_indptr is not None
        begin = i.mask_indptr[:batch]
        stride = prefix + extend + (0 if i.unified else cut)
        require("mask_indptr", begin >= 0, begin, "it must not be negative")
        size = i.custom_mask.numel()
        enough = begin + extend * stride <= size
        require("custom_mask", enough, begin, f"its {size} elements end before the mask of this sequence does")
    if i.q_positions is not None:
        size = i.q_positions.numel()
        require("q_positions", starts <= size, starts, f"q_positions has only {size} elements")
    if not found:
        return _Report((), torch.empty(0, 2, dtype=torch.int64, device=i.q.device))
    return _Report(tuple(rules), torch.stack(found))
