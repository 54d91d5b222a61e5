"""The ranks that this process is (one of several, or all virtual ones of a GPU), their streams and communicators."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any, Callable, ContextManager, Iterator, List, Optional, Sequence, TypeVar

import torch
import torch.distributed as dist

VIRTUAL = "EXTEND_ATTN_BENCH_VIRTUAL_RANKS"
# Ranks without a GPU of their own share one and take turns on it: a run can be tried out, and its times mean nothing.
SHARED = "EXTEND_ATTN_BENCH_SHARE_GPU"
T = TypeVar("T")


@dataclass
class Member:
    """One rank: its number, device and stream (None on a CPU), and its communicator once there is one."""

    rank: int
    device: torch.device
    stream: Optional[torch.cuda.Stream] = None
    comm: Any = None

    def active(self) -> ContextManager[Any]:
        """The rank's stream as the current one."""
        return torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext()


class Ranks:
    """``members`` are the ranks of this process; every process of a run does the same things in the same order."""

    def __init__(self, world: int, members: List[Member], *, virtual: bool) -> None:
        self.world, self.members, self.virtual = world, members, virtual
        self.device = members[0].device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def each(self, work: Callable[[Member], T]) -> List[T]:
        """``work`` of each member on its stream, one after the other."""
        found = []
        for member in self.members:
            with member.active():
                found.append(work(member))
        return found

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        """All ranks are here, and their GPUs idle."""
        self.synchronize()
        if not self.virtual:
            dist.all_reduce(torch.zeros(1))  # on the CPU, by gloo

    def check(self) -> None:
        """Raise what a call of a communicator has reported."""
        for member in self.members:
            if member.comm is not None:
                member.comm.check()

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Around captures that contain the communicators' calls."""
        with contextlib.ExitStack() as stack:
            for member in self.members:
                if member.comm is not None:
                    stack.enter_context(member.comm.capture())
            yield

    def make_communicators(self, dtypes: Sequence[torch.dtype], *, max_bytes: int, timeout_s: float) -> None:
        """Communicators that push and pull messages up to ``max_bytes``, so that each algorithm runs at each size."""
        from ...comm import CustomAllReduce, virtual_ranks

        options: Any = dict(dtypes=dtypes, max_bytes=max_bytes, max_push_bytes=max_bytes, timeout_s=timeout_s)
        if self.virtual:
            comms = virtual_ranks(self.world, self.device, **options)
        else:
            comms = [CustomAllReduce(dist.group.WORLD, self.device, **options)]
        for member, comm in zip(self.members, comms):
            member.comm = comm


def join(device_type: str) -> Ranks:
    """This process's ranks, by the environment that the team (or torchrun) gave it."""
    virtual = os.environ.get(VIRTUAL)
    if virtual:
        world, mine = int(virtual), range(int(virtual))
    else:
        world, mine = int(os.environ["WORLD_SIZE"]), range(int(os.environ["RANK"]), int(os.environ["RANK"]) + 1)
    if device_type == "cuda":
        index = 0 if virtual else int(os.environ["LOCAL_RANK"])
        if index >= torch.cuda.device_count() and not os.environ.get(SHARED):
            raise RuntimeError(f"rank {index} needs a GPU of its own; there are {torch.cuda.device_count()}")
        device = torch.device("cuda", index % torch.cuda.device_count())
        torch.cuda.set_device(device)
        members = [Member(rank, device, torch.cuda.Stream(device)) for rank in mine]
    else:
        device = torch.device("cpu")
        members = [Member(rank, device) for rank in mine]
    if not virtual:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")
    return Ranks(world, members, virtual=bool(virtual))
