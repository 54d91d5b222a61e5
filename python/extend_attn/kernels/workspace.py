"""Device memory that a launch needs beside its tensors: the partial results of splits, and words of arrivals."""

from __future__ import annotations

import threading
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch

# Zeros that calls under capture take their own words from, in elements: those of some thousand calls. A part that a
# graph has is never given out again, since nothing says when the graph is gone.
RESERVE = 1 << 19
GRANULE = 32  # elements: words of two calls share no cache line
MAX_ADDRESSES = 4096  # launches whose addresses are kept; past this they are looked up anew


class Workspace(NamedTuple):
    """``name`` is the kernels' parameter. ``zeroed``: zero before the first launch; each launch leaves what the next
    can begin with, of whatever plan."""

    name: str
    elements: int
    dtype: torch.dtype = torch.float32
    zeroed: bool = False

    def make(self, device: torch.device) -> torch.Tensor:
        make = torch.zeros if self.zeroed else torch.empty
        return make(self.elements, dtype=self.dtype, device=device)


class _Kept(threading.local):
    """(device, stream, workspace's name, type and zeroed) -> its memory. Launches of a stream run one after the other,
    so they can share it; two threads may mix theirs, so each thread has its own."""

    def __init__(self) -> None:
        self.tensors: Dict[tuple, torch.Tensor] = {}
        self.addresses: Dict[tuple, Tuple[int, ...]] = {}  # by what asks again; dropped when a tensor is replaced


_kept = _Kept()
_reserves: Dict[Tuple[Optional[int], torch.dtype], List[torch.Tensor]] = {}
_reserves_lock = threading.Lock()
_is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)
_current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


def workspaces(wanted: Sequence[Workspace], device: torch.device) -> Tuple[torch.Tensor, ...]:
    """Memory for a launch on the current stream of ``device``, the current one: kept for the stream when eager, new and
    so the graph's own under capture."""
    if not wanted:
        return ()
    if device.type != "cuda":
        return tuple([one.make(device) for one in wanted])
    if _is_capturing():
        return tuple([_words(one, device) if one.zeroed else one.make(device) for one in wanted])
    stream = _current_stream(device.index)
    found = []
    for one in wanted:
        key = (device.index, stream, one.name, one.dtype, one.zeroed)
        tensor = _kept.tensors.get(key)
        if tensor is None or tensor.numel() < one.elements:
            # what is replaced was made on this stream, and goes back to its allocator in the stream's order
            tensor = _kept.tensors[key] = one.make(device)
            _kept.addresses.clear()
            if one.zeroed:
                _fill_reserve(one, device)
        found.append(tensor)
    return tuple(found)


def addresses_of(wanted: Sequence[Workspace], device: torch.device, stream: int, token: object) -> Tuple[int, ...]:
    """The addresses of ``workspaces(wanted, device)``; ``token`` asks for the same ones each time, on the current
    ``stream``."""
    if _is_capturing():
        return tuple([t.data_ptr() for t in workspaces(wanted, device)])
    found = _kept.addresses.get((token, stream))
    if found is None:
        found = tuple([t.data_ptr() for t in workspaces(wanted, device)])
        if len(_kept.addresses) >= MAX_ADDRESSES:
            _kept.addresses.clear()
        _kept.addresses[token, stream] = found
    return found


def _fill_reserve(one: Workspace, device: torch.device) -> None:
    """Makes the zeros for calls under capture: what those made themselves would be zeroed again by every replay."""
    with _reserves_lock:
        kept = _reserves.setdefault((device.index, one.dtype), [])
        if not kept or kept[-1].numel() < RESERVE // 2:
            kept.append(torch.zeros(RESERVE, dtype=one.dtype, device=device))


def _words(one: Workspace, device: torch.device) -> torch.Tensor:
    """Zeros for a call under capture; where the reserve has none left, the graph zeroes its own."""
    size = -(-one.elements // GRANULE) * GRANULE
    with _reserves_lock:
        kept = _reserves.get((device.index, one.dtype))
        if not kept or kept[-1].numel() < size:
            return one.make(device)
        taken, kept[-1] = kept[-1].split([size, kept[-1].numel() - size])
        return taken[: one.elements]
