"""Device memory that a launch needs beside its tensors: the partial results of splits, and counters."""

from __future__ import annotations

import threading
from typing import Callable, Dict, NamedTuple, Sequence, Tuple

import torch


class Workspace(NamedTuple):
    """``name`` is the kernels' parameter. ``zeroed``: zero before the first launch; every launch leaves zeros."""

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


_kept = _Kept()
_is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)
_current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


def workspaces(wanted: Sequence[Workspace], device: torch.device) -> Tuple[torch.Tensor, ...]:
    """Memory for a launch on the current stream of ``device``, the current one: kept for the stream when eager, new and
    so the graph's own under capture."""
    if not wanted:
        return ()
    if device.type != "cuda" or _is_capturing():
        return tuple([one.make(device) for one in wanted])
    stream = _current_stream(device.index)
    found = []
    for one in wanted:
        key = (device.index, stream, one.name, one.dtype, one.zeroed)
        tensor = _kept.tensors.get(key)
        if tensor is None or tensor.numel() < one.elements:
            # what is replaced was made on this stream, and goes back to its allocator in the stream's order
            tensor = _kept.tensors[key] = one.make(device)
        found.append(tensor)
    return tuple(found)
