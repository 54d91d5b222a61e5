"""tp_qknorm: the fused kernel against all-gather and norm, and against two all-reduces of the sums of squares."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..check import error_of
from ..providers.base import OWN, Skip
from . import clock
from .providers import Providers
from .ranks import Member, Ranks

EPS = 1e-6


class Shard:
    """One rank's q and k, ``[tokens, width / world]``, with their weights and what should come out."""

    def __init__(self, member: Member, world: int, task: Mapping[str, Any]) -> None:
        self.member, self.world = member, world
        self.widths = (task["q_width"], task["k_width"])
        self.x: List[torch.Tensor] = []
        self.weight: List[torch.Tensor] = []
        self.start: List[torch.Tensor] = []
        self.want: List[torch.Tensor] = []
        self.full_weight: List[torch.Tensor] = []
        dtype = getattr(torch, task["dtype"])
        generator = torch.Generator(member.device).manual_seed(7)
        for width in self.widths:
            if width % world:
                raise Skip(f"width {width} is no multiple of {world} ranks")
            mine = slice(member.rank * width // world, (member.rank + 1) * width // world)
            options: Any = dict(generator=generator, device=member.device)
            full = torch.randn(task["tokens"], width, **options).to(dtype)
            weight = (1 + 0.1 * torch.randn(width, **options)).to(dtype)
            self.want.append(F.rms_norm(full.float(), (width,), weight.float(), EPS)[:, mine])
            self.start.append(full[:, mine].contiguous())
            self.x.append(self.start[-1].clone())
            self.weight.append(weight[mine].contiguous())
            self.full_weight.append(weight)

    def restore(self) -> None:
        for x, start in zip(self.x, self.start):
            x.copy_(start)

    def error(self) -> Any:
        return max(error_of(x, want) for x, want in zip(self.x, self.want))

    # -- ways; each normalises x in place

    def fused(self) -> None:
        from extend_attn import fused_parallel_qknorm

        fused_parallel_qknorm(self.member.comm, *self.x, *self.weight, EPS)

    def all_gather(self) -> None:
        """What needs no kernel of one's own: gather the rows, norm them whole, keep this rank's part."""
        for x, width, weight in zip(self.x, self.widths, self.full_weight):
            tokens, part = x.shape
            gathered = torch.empty(self.world, tokens, part, dtype=x.dtype, device=x.device)
            dist.all_gather_into_tensor(gathered.view(-1), x.view(-1))
            whole = F.rms_norm(gathered.transpose(0, 1).reshape(tokens, width), (width,), weight, EPS)
            x.copy_(whole.view(tokens, self.world, part)[:, self.member.rank])

    def two_all_reduces(self, own: bool) -> None:
        for x, width, weight in zip(self.x, self.widths, self.weight):
            squares = x.float().square_().sum(-1)
            if own:
                squares = self.member.comm.all_reduce(squares)
            else:
                dist.all_reduce(squares)
            scale = torch.rsqrt(squares / width + EPS)
            torch.mul(x.float() * scale[:, None], weight, out=x)


def measure(ranks: Ranks, providers: Providers, task: Mapping[str, Any]) -> Dict[str, Any]:
    """``{us: {eager, graph}, error, wrong?}``: checked against fp32 over the full width, before and after the clock."""
    provider, algo = task["provider"], task["algo"]
    reason = providers.refuses(provider, algo)
    if reason:
        raise Skip(reason)
    if ranks.virtual and algo == "two_all_reduces":
        raise Skip("virtual ranks may allocate nothing between their launches, and this way does")
    shards = {member.rank: Shard(member, ranks.world, task) for member in ranks.members}
    ways = {
        "fused": lambda shard: shard.fused(),
        "all_gather": lambda shard: shard.all_gather(),
        "two_all_reduces": lambda shard: shard.two_all_reduces(provider == OWN),
    }

    def run(member: Member) -> None:
        ways[algo](shards[member.rank])

    def restore() -> None:
        for shard in shards.values():
            shard.restore()
        ranks.barrier()

    answer: Dict[str, Any] = {"us": {}}

    def wrong(what: str) -> bool:
        ranks.synchronize()
        error = max(shard.error() for shard in shards.values())
        answer["error"] = max(answer.get("error", 0.0), error.max)
        if error.wrong:
            answer["wrong"] = f"wrong result {what}: {error}"
        return bool(error.wrong)

    counts = clock.counts_for(task["tokens"] * sum(shards[ranks.members[0].rank].widths) * 2, ranks.on_gpu)
    restore()
    ranks.each(run)
    if wrong("of an eager call"):
        return answer
    answer["us"]["eager"] = clock.eager_us(ranks, run, counts)
    if ranks.on_gpu:
        single = clock.capture(ranks, run)
        restore()
        clock.replay(ranks, single)
        if wrong("of a replay"):
            return answer
        graphs = clock.capture(ranks, lambda member: [run(member) for _ in range(counts.calls)])
        answer["us"]["graph"] = clock.graph_us(ranks, graphs, counts.spans) / counts.calls
    ranks.check()
    return answer
