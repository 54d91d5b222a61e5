"""The ranks that a test of collectives runs on: virtual ones on one GPU; under torchrun, this process's one of several.

A test does the same thing on each local rank with ``ranks.each``; what all ranks' inputs are is computed from a seed,
so that every process knows the expected result.
"""

from __future__ import annotations

import os
from typing import Callable, Dict, List, Tuple

import torch

from extend_attn.comm import CustomAllReduce, virtual_ranks
from extend_attn.comm.names import DTYPE_NAMES

TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
WORLDS = [int(os.environ["WORLD_SIZE"])] if TORCHRUN else [2, 4, 8]
DTYPES = [getattr(torch, name) for name in DTYPE_NAMES]
ALGOS = ["one_shot_push", "one_shot_pull", "two_shot_pull"]
MAX_BYTES = 16 << 20


def device() -> torch.device:
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) if TORCHRUN else 0)


def process_group():
    """The gloo group of a torchrun job."""
    import torch.distributed as dist

    if not dist.is_initialized():
        torch.cuda.set_device(device())
        dist.init_process_group("cpu:gloo,cuda:nccl" if os.environ.get("EXTEND_ATTN_TEST_NCCL") else "gloo")
    return dist.group.WORLD


class Ranks:
    """Communicators and streams of the ranks in this process; ``mine`` are their numbers."""

    def __init__(self, world: int, **arguments) -> None:
        arguments = {
            "dtypes": DTYPES,
            "max_bytes": MAX_BYTES,
            "max_push_bytes": MAX_BYTES,
            "timeout_s": 20.0,
            **arguments,
        }
        self.world = world
        self.device = device()
        if TORCHRUN:
            self.comms = [CustomAllReduce(process_group(), self.device, **arguments)]
        else:
            self.comms = virtual_ranks(world, self.device, **arguments)
        self.mine = [comm.rank for comm in self.comms]
        self.streams = [torch.cuda.Stream(self.device) for _ in self.comms]

    def each(self, call: Callable, *lists) -> List:
        """``call(comm, *items)`` on each rank's stream, one after the other, with nothing between that waits."""
        results = []
        for number, (comm, stream) in enumerate(zip(self.comms, self.streams)):
            with torch.cuda.stream(stream):
                results.append(call(comm, *(items[number] for items in lists)))
        return results

    def local(self, of_all: List) -> List:
        return [of_all[rank] for rank in self.mine]

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def check(self) -> None:
        for comm in self.comms:
            comm.check()

    def close(self) -> None:
        for comm in self.comms:
            comm.close()


_shared: Dict[int, Ranks] = {}


def shared(world: int) -> Ranks:
    """Ranks that tests share, as long as none leaves them poisoned."""
    if world not in _shared:
        _shared[world] = Ranks(world)
    return _shared[world]


def integers(world: int, count: int, dtype: torch.dtype, seed: int) -> List[torch.Tensor]:
    """Each rank's input: small whole numbers, whose sums are exact in every type."""
    generator = torch.Generator(device()).manual_seed(seed)
    return [torch.randint(-8, 9, (count,), device=device(), generator=generator).to(dtype) for _ in range(world)]


def normals(world: int, count: int, dtype: torch.dtype, seed: int) -> List[torch.Tensor]:
    generator = torch.Generator(device()).manual_seed(seed)
    return [torch.randn(count, device=device(), generator=generator).to(dtype) for _ in range(world)]


def expected_sum(inputs: List[torch.Tensor]) -> torch.Tensor:
    """fp32, in rank order, from +0, rounded once."""
    total = torch.zeros(inputs[0].shape, dtype=torch.float32, device=inputs[0].device)
    for x in inputs:
        total += x.float()
    return total.to(inputs[0].dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


def assert_same_bits(got: torch.Tensor, want: torch.Tensor, what: str = "") -> None:
    """Equal bit for bit; NaN equals NaN of any payload."""
    differ = (bits(got) != bits(want)) & ~(got.isnan() & want.isnan())
    if differ.any():
        at = int(differ.flatten().nonzero()[0])
        number = int(differ.sum())
        raise AssertionError(
            f"{what}: {number} of {got.numel()} differ, first at {at}: got {got.flatten()[at].item()}, "
            f"expected {want.flatten()[at].item()}"
        )


def poisoned_like(xs: List[torch.Tensor]) -> List[torch.Tensor]:
    return [torch.full_like(x, float("nan")) for x in xs]


def capture(ranks: Ranks, body: Callable, *lists) -> Tuple[List[torch.cuda.CUDAGraph], List]:
    """One graph a local rank of ``body(comm, *items)``, inside one capture() a rank."""
    graphs, results = [], []
    for number, (comm, stream) in enumerate(zip(ranks.comms, ranks.streams)):
        graph = torch.cuda.CUDAGraph()
        with comm.capture(), torch.cuda.graph(graph, stream=stream):
            results.append(body(comm, *(items[number] for items in lists)))
        graphs.append(graph)
    return graphs, results
