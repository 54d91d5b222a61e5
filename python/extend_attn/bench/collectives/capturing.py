"""What captures cost: wall time to make graphs full of collectives, with the library, with NCCL, with none."""

from __future__ import annotations

import math
import time
from typing import Any, Callable, Dict, List, Mapping

import torch

from ..providers.base import OWN, Skip
from . import clock
from .all_reduce import expected, input_of, largest_error
from .providers import Call, Providers
from .ranks import Member, Ranks
from .step import NOTHING


def measure(ranks: Ranks, providers: Providers, task: Mapping[str, Any]) -> Dict[str, Any]:
    """``{us: {graph}, error, exchanges?}``: us for all graphs, inside one ``capture()``, up to the last one's
    readiness, and how often the library's ranks told each other their inputs' handles meanwhile (it should be once).

    Each graph is ``collectives`` calls with an elementwise kernel before each, as a model's layers are; ``none`` has
    the kernels alone. The last graph is replayed and its last sum checked.
    """
    if not ranks.on_gpu:
        raise Skip("needs a GPU: there are no graphs on a CPU")
    dtype = getattr(torch, task["dtype"])
    count = task["bytes"] // dtype.itemsize

    def prepare(member: Member) -> Call:
        if task["provider"] == NOTHING:
            x = torch.zeros(count, dtype=dtype, device=member.device)
            return Call(x, lambda: x, in_place=True)
        return providers.prepare(member, task["provider"], task["algo"], count, dtype)

    calls = dict(zip((member.rank for member in ranks.members), ranks.each(prepare)))
    source = {m.rank: input_of(m.rank, count, dtype, m.device, seed=1) for m in ranks.members}
    outs: Dict[int, torch.Tensor] = {}

    def body(member: Member) -> None:
        call = calls[member.rank]
        for _ in range(task["collectives"]):
            call.x.copy_(source[member.rank])
            outs[member.rank] = call.run()

    clock.eager_us(ranks, body, clock.Counts(1, 1))
    clock.capture(ranks, body)  # what only a first capture pays
    ranks.barrier()
    before = _exchanges(ranks)
    started = time.perf_counter()
    graphs = _capture_all(ranks, body, task["graphs"])
    us = 1e6 * (time.perf_counter() - started)
    exchanges = _exchanges(ranks) - before
    for out in outs.values():
        out.fill_(math.nan)  # what an eager call left there must not pass for the replay's
    ranks.barrier()
    clock.replay(ranks, graphs[-1])
    ranks.synchronize()
    answer: Dict[str, Any] = {"us": {"graph": us}, "error": 0.0}
    if task["provider"] == OWN:
        answer["exchanges"] = exchanges
    if task["provider"] != NOTHING:
        want = expected(ranks.world, count, dtype, ranks.device, seed=1)
        answer["error"] = max(largest_error(out, want) for out in outs.values())
        if answer["error"]:
            answer.update(us={}, wrong=f"wrong result of a replay: error {answer['error']:.3g}")
    ranks.check()
    return answer


def _exchanges(ranks: Ranks) -> int:
    comm = ranks.members[0].comm
    return 0 if comm is None else comm.handle_exchanges


def _capture_all(ranks: Ranks, body: Callable[[Member], Any], number: int) -> List[List[torch.cuda.CUDAGraph]]:
    graphs: List[List[torch.cuda.CUDAGraph]] = []
    pools: Dict[int, Any] = {}
    with ranks.capturing():  # one exchange of handles for all of them
        for _ in range(number):
            graphs.append([])
            for member in ranks.members:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=member.stream, pool=pools.get(member.rank)):
                    body(member)
                pools.setdefault(member.rank, graph.pool())
                graphs[-1].append(graph)
    return graphs
