"""Times of collectives: eager calls and graph replay, each the median of this process's slowest rank.

No rank is ever ahead of the others by more than a call, since each call waits for all, so that no barrier is needed
inside a measurement, and none distorts it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Callable, List

import torch

from .ranks import Member, Ranks

Body = Callable[[Member], object]


@dataclass(frozen=True)
class Counts:
    """``calls`` between two marks (or in a graph), and how many such spans are timed. Equal on all ranks."""

    calls: int
    spans: int


def counts_for(nbytes: int, on_gpu: bool) -> Counts:
    """About 5 to 20 ms of calls at any size on a GPU; a handful on a CPU, where times are for the bench's tests."""
    if not on_gpu:
        return Counts(2, 3)
    if nbytes <= 1 << 20:
        return Counts(50, 30)
    return Counts(20, 15) if nbytes <= 16 << 20 else Counts(5, 12)


def eager_us(ranks: Ranks, body: Body, counts: Counts) -> float:
    """us of one eager call, back to back: a small message is bound by the host's launches, as it is in an engine."""
    for _ in range(3):
        ranks.each(body)
    ranks.barrier()

    def calls() -> None:
        for _ in range(counts.calls):
            ranks.each(body)

    return _slowest(ranks, calls, counts.spans) / counts.calls


def capture(ranks: Ranks, body: Body) -> List[torch.cuda.CUDAGraph]:
    """One graph a member, ready to be replayed."""
    graphs = []
    with ranks.capturing():
        for member in ranks.members:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=member.stream):
                body(member)
            graphs.append(graph)
    return graphs


def replay(ranks: Ranks, graphs: List[torch.cuda.CUDAGraph]) -> None:
    for member, graph in zip(ranks.members, graphs):
        with member.active():
            graph.replay()


def graph_us(ranks: Ranks, graphs: List[torch.cuda.CUDAGraph], spans: int) -> float:
    """us of one replay."""
    for _ in range(2):
        replay(ranks, graphs)
    ranks.barrier()
    return _slowest(ranks, lambda: replay(ranks, graphs), spans)


def _slowest(ranks: Ranks, work: Callable[[], None], spans: int) -> float:
    """Median us of ``work``, on the slowest member's stream."""
    if not ranks.on_gpu:
        times = []
        for _ in range(spans):
            start = time.perf_counter()
            work()
            times.append(1e6 * (time.perf_counter() - start))
        return median(times)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(spans + 1)] for _ in ranks.members]

    def mark(number: int) -> None:
        for member, of_member in zip(ranks.members, marks):
            of_member[number].record(member.stream)

    mark(0)
    for number in range(spans):
        work()
        mark(number + 1)
    ranks.synchronize()
    return max(median(1e3 * a.elapsed_time(b) for a, b in zip(one, one[1:])) for one in marks)
