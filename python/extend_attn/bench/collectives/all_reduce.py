"""One all-reduce: checked eagerly and replayed, then timed both ways."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Mapping

import torch

from . import clock
from .providers import Call, Providers
from .ranks import Ranks


def input_of(rank: int, count: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """Whole numbers of -8 to 8 that differ by rank and seed: sums of 8 ranks are exact in every type."""
    numbers = torch.arange(count, device=device, dtype=torch.int64)
    return ((numbers * 7 + rank * 5 + seed * 3 + numbers // 251) % 17 - 8).to(dtype)


def expected(world: int, count: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    total = torch.zeros(count, device=device)
    for rank in range(world):
        total += input_of(rank, count, torch.float32, device, seed)
    return total.to(dtype)


def largest_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max|got - want| / max|want|; inf where an element is not finite."""
    difference = (got.float() - want.float()).abs().max()
    if not bool(torch.isfinite(difference)):
        return math.inf
    return float(difference / want.float().abs().max().clamp(min=1e-30))


class _Measured:
    """The calls of this process's ranks for one task."""

    def __init__(self, ranks: Ranks, calls: List[Call], count: int, dtype: torch.dtype) -> None:
        self.ranks, self.count, self.dtype = ranks, count, dtype
        self._by_rank = dict(zip((member.rank for member in ranks.members), calls))
        self._seed = 0

    def run(self, member: Any) -> torch.Tensor:
        return self._by_rank[member.rank].run()

    def fill(self) -> None:
        """Fresh inputs, and NaN where the sum will be."""
        self._seed += 1
        for rank, call in self._by_rank.items():
            call.x.copy_(input_of(rank, self.count, self.dtype, call.x.device, self._seed))
        self.ranks.barrier()

    def zero(self) -> None:
        """For in-place calls one after the other, whose sums would grow without bound."""
        for call in self._by_rank.values():
            call.x.zero_()
        self.ranks.barrier()

    def error(self, outs: List[torch.Tensor]) -> float:
        self.ranks.synchronize()
        want = expected(self.ranks.world, self.count, self.dtype, self.ranks.device, self._seed)
        return max(largest_error(out, want) for out in outs)


def measure(ranks: Ranks, providers: Providers, task: Mapping[str, Any]) -> Dict[str, Any]:
    """``{us: {eager, graph}, error, wrong?}``; a wrong result is not timed.

    Integers must come out exactly. In a graph of its own the call is replayed with fresh inputs and checked again.
    """
    dtype = getattr(torch, task["dtype"])
    count = task["bytes"] // dtype.itemsize
    calls = ranks.each(lambda member: providers.prepare(member, task["provider"], task["algo"], count, dtype))
    measured = _Measured(ranks, calls, count, dtype)
    counts = clock.counts_for(task["bytes"], ranks.on_gpu)
    answer: Dict[str, Any] = {"us": {}, "error": 0.0}

    def checked(what: str, outs: List[torch.Tensor]) -> bool:
        error = measured.error(outs)
        answer["error"] = max(answer["error"], error)
        if error:
            answer["wrong"] = f"wrong result {what}: error {error:.3g}"
        return not error

    measured.fill()
    outs = ranks.each(measured.run)
    if not checked("of an eager call", outs):
        return answer
    if calls[0].in_place:
        measured.zero()
    answer["us"]["eager"] = clock.eager_us(ranks, measured.run, counts)
    if ranks.on_gpu:
        single = clock.capture(ranks, measured.run)
        measured.fill()
        if not calls[0].in_place:
            for out in outs:
                out.fill_(math.nan)
            ranks.barrier()
        clock.replay(ranks, single)
        if not checked("of a replay", outs):
            return answer
        if calls[0].in_place:
            measured.zero()
        graphs = clock.capture(ranks, lambda member: [measured.run(member) for _ in range(counts.calls)])
        answer["us"]["graph"] = clock.graph_us(ranks, graphs, counts.spans) / counts.calls
        if not calls[0].in_place:
            checked("after the replays", outs)
    ranks.check()
    return answer
