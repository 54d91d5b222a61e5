"""A captured decoder step at tensor parallelism, with this library's all-reduce and with NCCL: us a step."""

from __future__ import annotations

import gc
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import torch
import torch.distributed as dist

from ..check import error_of
from ..providers.base import OWN, Skip
from . import clock
from .decoder import Batch, Decoder, Step, lockstep
from .providers import Providers
from .ranks import Member, Ranks
from .shapes import MODELS

SPANS = 30  # replays timed
NOTHING = "none"  # no communication: what the step costs without it, not a result

Reduce = Callable[[torch.Tensor], torch.Tensor]


class StepBench:
    """Keeps the decoders, whose weights are large, and what the last batch should come to."""

    def __init__(self, ranks: Ranks, providers: Providers) -> None:
        self.ranks, self.providers = ranks, providers
        self._made: Tuple[Any, Dict[int, Decoder]] = (None, {})
        self._expected: Tuple[Any, List[torch.Tensor]] = (None, [])

    def measure(self, task: Mapping[str, Any]) -> Dict[str, Any]:
        """``{us: {graph}, error, wrong?}``: the captured step against the step with fp32 sums."""
        reduces = {member.rank: self._reduce(member, task["provider"], task["algo"]) for member in self.ranks.members}
        decoders, expected = self._decoders(task)
        outs: Dict[int, torch.Tensor] = {}

        def body(member: Member) -> None:
            outs[member.rank] = _run(decoders[member.rank].step(), reduces[member.rank])

        answer: Dict[str, Any] = {"us": {}, "collectives": MODELS[task["model"]].all_reduces}
        if not self.ranks.on_gpu:
            self.ranks.each(body)
            answer["us"]["eager"] = clock.eager_us(self.ranks, body, clock.Counts(1, 1))
        else:
            graphs = clock.capture(self.ranks, body)
            clock.replay(self.ranks, graphs)
        self.ranks.synchronize()
        if task["provider"] != NOTHING:
            error = max(error_of(outs[m.rank], want) for m, want in zip(self.ranks.members, expected))
            answer["error"] = error.max
            if error.wrong:
                return {**answer, "us": {}, "wrong": f"wrong result: {error}"}
        if self.ranks.on_gpu:
            answer["us"]["graph"] = clock.graph_us(self.ranks, graphs, SPANS)
        self.ranks.check()
        return answer

    def _reduce(self, member: Member, provider: str, algo: str) -> Reduce:
        if provider == NOTHING:
            return lambda x: x
        reason = self.providers.refuses(provider, algo)
        if reason:
            raise Skip(reason)
        if provider == OWN:
            return lambda x: member.comm.all_reduce(x, algo=algo)

        def in_place(x: torch.Tensor) -> torch.Tensor:
            dist.all_reduce(x)
            return x

        return in_place

    def _decoders(self, task: Mapping[str, Any]) -> Tuple[Dict[int, Decoder], List[torch.Tensor]]:
        """The decoders of this process's ranks, and the hidden states they should come to, in members' order."""
        of_weights = (task["model"], task["slots"])
        if self._made[0] != of_weights:
            self._made, self._expected = (None, {}), (None, [])
            gc.collect()
            model, world = MODELS[task["model"]], self.ranks.world
            made = {m.rank: Decoder(model, m.rank, world, task["slots"], m.device) for m in self.ranks.members}
            self._made = (of_weights, made)
        decoders = self._made[1]
        batch = Batch(task["batch"], task["tokens"], task["prefix"])
        if self._expected[0] != batch:
            for decoder in decoders.values():
                decoder.use(batch)
            self.ranks.synchronize()
            self._expected = (batch, lockstep([one.step() for one in decoders.values()], self._reference_sum))
            self.ranks.synchronize()
        return decoders, self._expected[1]

    def _reference_sum(self, partials: List[torch.Tensor]) -> List[torch.Tensor]:
        """fp32 sums in rank order, rounded once; every rank gets a tensor of its own."""
        if self.ranks.virtual:
            parts: List[torch.Tensor] = partials
        else:
            parts = [torch.empty_like(partials[0]) for _ in range(self.ranks.world)]
            dist.all_gather(parts, partials[0].contiguous())
        total = torch.zeros_like(parts[0], dtype=torch.float32)
        for part in parts:
            total += part.float()
        return [total.to(partials[0].dtype) for _ in partials]


def _run(step: Step, reduce: Reduce) -> torch.Tensor:
    """One rank's step with its all-reduce in between."""
    total: Optional[torch.Tensor] = None
    while True:
        try:
            total = reduce(step.send(total))  # type: ignore[arg-type]
        except StopIteration as end:
            return end.value
