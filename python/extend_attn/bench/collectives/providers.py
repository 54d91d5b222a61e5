"""Who reduces: this library's algorithms, NCCL, torch's symmetric memory, and gloo where there is no GPU."""

from __future__ import annotations

from typing import Any, Callable, Dict, NamedTuple, Optional

import torch
import torch.distributed as dist

from ..providers.base import OWN, Skip
from .ranks import Member, Ranks


class Call(NamedTuple):
    """A prepared all-reduce of one rank: fill ``x``; ``run()`` enqueues it and returns where the sum will be."""

    x: torch.Tensor
    run: Callable[[], torch.Tensor]
    in_place: bool


class Providers:
    """Prepares calls for the ranks of this process. ``largest``: bytes of the largest message of the run."""

    def __init__(self, ranks: Ranks, largest: int) -> None:
        self.ranks, self.largest = ranks, largest
        self._symmetric: Dict[torch.dtype, torch.Tensor] = {}

    def refuses(self, provider: str, algo: str) -> Optional[str]:
        """Why it can't run here; None if it may."""
        if provider == "gloo":
            return "it is the stand-in for NCCL on a CPU" if self.ranks.on_gpu else None
        if provider == OWN and self.ranks.members[0].comm is not None:
            return None
        if not self.ranks.on_gpu:
            return "needs a GPU"
        if self.ranks.virtual:
            return "virtual ranks share one GPU, which it has no call for"
        if torch.cuda.device_count() < self.ranks.world:
            return "it needs a GPU for each rank"
        return None

    def prepare(self, member: Member, provider: str, algo: str, count: int, dtype: torch.dtype) -> Call:
        """The call of one member for ``count`` elements. Raises Skip where it can't be made."""
        reason = self.refuses(provider, algo)
        if reason:
            raise Skip(reason)
        if provider == "symm_mem":
            return self._prepare_symmetric(member, algo, count, dtype)
        x = torch.zeros(count, dtype=dtype, device=member.device)
        if provider == OWN:
            out, comm = torch.empty_like(x), member.comm
            return Call(x, lambda: comm.all_reduce(x, out=out, algo=algo), in_place=False)

        def reduce() -> torch.Tensor:
            dist.all_reduce(x)
            return x

        return Call(x, reduce, in_place=True)

    def _prepare_symmetric(self, member: Member, algo: str, count: int, dtype: torch.dtype) -> Call:
        """The input lies in symmetric memory from the start; what copying it there would cost is not timed."""
        group = dist.group.WORLD.group_name
        try:
            ops: Any = torch.ops.symm_mem
            one_shot, two_shot = ops.one_shot_all_reduce_out, ops.two_shot_all_reduce_
            x = self._symmetric_buffer(member, dtype, group)[:count]
        except (ImportError, AttributeError, RuntimeError) as error:
            raise Skip(f"torch's symmetric memory: {str(error).splitlines()[0][:200]}") from error
        x.zero_()
        if algo == "one_shot":
            out = torch.empty(count, dtype=dtype, device=member.device)
            return Call(x, lambda: one_shot(x, "sum", group, out), in_place=False)
        return Call(x, lambda: two_shot(x, "sum", group), in_place=True)

    def _symmetric_buffer(self, member: Member, dtype: torch.dtype, group: str) -> torch.Tensor:
        if dtype not in self._symmetric:
            import torch.distributed._symmetric_memory as symm_mem

            buffer = symm_mem.empty(self.largest // dtype.itemsize, dtype=dtype, device=member.device)
            symm_mem.rendezvous(buffer, group)
            self._symmetric[dtype] = buffer
        return self._symmetric[dtype]
