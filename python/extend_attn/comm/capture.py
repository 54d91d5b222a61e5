"""Captured calls: their inputs made known to all ranks when the capture is left, so that pull reads them in place."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

import torch

from .errors import CommError

if TYPE_CHECKING:
    from .communicator import CustomAllReduce

# Slots that a capture() finds free when it is entered (64 bytes each): no memory can be had during a capture.
SLOTS = 16384
EXCHANGE = "capture"  # what the rendezvous calls it when a capture() is left


class Capture:
    """``with comm.capture():`` around one or more stream captures, entered before and left after them, on all ranks.

    What each captured call does is recorded and compared between the ranks when it is left, and the pulls' inputs are
    registered: one slot a call, the allocation's handle and the offset, never by address. An input that can't be
    exported is copied in, which is decided when it is captured. Graphs may be replayed once this is left.
    """

    def __init__(self, comm: CustomAllReduce) -> None:
        self._comm = comm
        self._calls: List[Tuple[Any, ...]] = []
        self._inputs: List[Tuple[int, Optional[Tuple[bytes, int, int]]]] = []  # (slot, what peers need; None: staging)

    def __enter__(self) -> None:
        self._comm._enter_capture(self)
        self._comm._core.reserve_slots(SLOTS)

    def note(self, call: Tuple[Any, ...]) -> None:
        """A captured call, as all ranks should have it."""
        self._calls.append(call)

    def register(self, x: torch.Tensor) -> Tuple[int, bool]:
        """(slot, whether ``x`` is copied in) for the input of a captured pull."""
        comm = self._comm
        slot = comm._core.take_slot()
        if slot < 0:
            raise RuntimeError(
                f"capture(): more than {SLOTS} pulls were captured; leave it and enter another for the rest"
            )
        exported = comm._export(x.data_ptr())
        if exported is None:
            comm._say_once(
                "the input of a captured all-reduce can't be shared with other processes (expandable segments, "
                "cudaMallocAsync), so it is copied first; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False avoids that"
            )
            self._inputs.append((slot, None))
            return slot, True
        handle, offset, base = exported
        # Who drops the graph frees its pool, while peers still have it mapped: one tensor keeps an allocation alive.
        comm._kept.setdefault(base, x)
        self._inputs.append((slot, (handle, offset, x.data_ptr())))
        return slot, False

    def __exit__(self, kind: Any, error: Optional[BaseException], trace: Any) -> None:
        comm = self._comm
        comm._leave_capture()
        mine = {
            "error": None if error is None else f"{type(error).__name__}: {error}",
            "calls": self._calls,
            "inputs": [given for _, given in self._inputs],
        }

        def follow(ranks: List[Dict[str, Any]]) -> None:
            if error is None:
                _check_alike(ranks)
                self._fill(ranks)

        comm._rendezvous.exchange(EXCHANGE, mine, follow)

    def _fill(self, ranks: List[Dict[str, Any]]) -> None:
        comm = self._comm
        bases: Dict[Tuple[int, bytes], int] = {}  # of this capture's handles only: an address may be reused later
        for number, (slot, _) in enumerate(self._inputs):
            addresses = []
            for rank, there in enumerate(ranks):
                given = there["inputs"][number]
                if given is None:
                    addresses.append(comm._core.staging(rank))
                elif rank == comm.rank or comm._rendezvous.virtual:
                    addresses.append(given[2])
                else:
                    handle, offset, _ = given
                    if (rank, handle) not in bases:
                        bases[rank, handle] = comm._core.open(handle)
                    addresses.append(bases[rank, handle] + offset)
            comm._core.fill_slot(slot, addresses)


def _check_alike(ranks: List[Dict[str, Any]]) -> None:
    for rank, there in enumerate(ranks):
        if there["error"]:
            raise CommError(f"capture(): rank {rank} left it with {there['error']}; none of its graphs can be replayed")
    for rank, there in enumerate(ranks):
        if len(there["calls"]) != len(ranks[0]["calls"]):
            counts = ", ".join(f"rank {r}: {len(t['calls'])}" for r, t in enumerate(ranks))
            raise CommError(
                f"capture(): ranks captured different numbers of calls ({counts}); their graphs would never meet"
            )
        for number, (one, other) in enumerate(zip(ranks[0]["calls"], there["calls"])):
            if one != other:
                raise CommError(f"capture(): call {number} is {one} on rank 0 and {other} on rank {rank}")


def warn(message: str) -> None:
    """A RuntimeWarning at the public call."""
    warnings.warn(message, RuntimeWarning, stacklevel=4)
