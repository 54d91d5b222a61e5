"""Clocks: CUDA-graph replay over rotated inputs, ``do_bench``, and the two ceilings of the machine.

Graph replay is the number to compare by: an engine replays graphs, and launch overhead of Python is out of it. All
input sets are captured in one graph, one call after the other, and together they are several times the L2, so that a
call never finds its keys warm. The GPU rests between bursts: a compute-bound kernel that comes after 60 ms of others
takes up to a tenth longer, since the clock falls at the power cap, and would be slower for standing first in a list.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Callable, List, Optional, Sequence, Tuple

import torch

from .problems import Ceilings

# Length of a replay, as estimated from eager calls. Those of short kernels take several times the truth; the replay is
# still long against the gap of about 5 us between two of them.
GRAPH_US = 6000.0
BURST_US = 60000.0  # replayed time per figure
UNRESTED_US = 12000.0  # of a burst; a figure that takes no longer does without rests
REST_S = 0.05
MAX_CALLS = 400  # nodes of one graph
HOST_SECONDS = 1.0

Run = Callable[[int], object]


def rotations(bytes_per_call: int, l2_bytes: int, most: int = 20) -> int:
    """How many input sets make the rotation four times the L2."""
    return max(2, min(most, -(-4 * l2_bytes // max(1, bytes_per_call))))


def graph_us(
    run: Run, num_sets: int, *, burst_us: float = BURST_US, drop_us: Optional[float] = None
) -> Tuple[float, List[object]]:
    """Median us of one call, by replaying a graph of calls over all sets for about ``burst_us``; of one replay where a
    call takes more than ``drop_us`` in it. Also what the captured calls returned.

    The caller has run every set once already (compilation and workspaces lie behind us). Raises what capture raises.
    """
    estimate = max(1.0, event_us(lambda: [run(i) for i in range(num_sets)]) / num_sets)
    graph_length = min(GRAPH_US, burst_us / 10)
    rounds = max(1, min(MAX_CALLS // num_sets, int(graph_length / (estimate * num_sets)) + 1))
    graph = torch.cuda.CUDAGraph()
    returned: List[object] = []
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            returned = [run(i) for i in range(num_sets)]
    graph.replay()
    replay = event_us(graph.replay)
    once = replay / (rounds * num_sets)
    if drop_us is not None and once > drop_us:
        return once, returned
    replays = max(5, min(30, int(burst_us / max(1.0, replay))))
    if burst_us <= UNRESTED_US:
        times = _replays_us(graph, replays)
    else:
        times = []
        most = max(1, int(UNRESTED_US / replay) - 1)  # the first replay after a rest is not timed: the clock comes back
        while len(times) < replays // 2:
            time.sleep(REST_S)
            graph.replay()
            times += _replays_us(graph, most)
    return median(times) / (rounds * num_sets), returned


def _replays_us(graph: torch.cuda.CUDAGraph, count: int) -> List[float]:
    """Of each of ``count`` replays, one right after the other."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [1e3 * a.elapsed_time(b) for a, b in zip(marks, marks[1:])]


def do_bench_us(run: Run) -> float:
    """Median us of one eager call as Triton's ``do_bench`` sees it: L2 flushed, launch included."""
    from triton.testing import do_bench

    time.sleep(REST_S)
    return 1e3 * do_bench(lambda: run(0), warmup=10, rep=40, return_mode="median")


def wall_us(run: Run, seconds: float = 0.2) -> float:
    """Median us of one call on a CPU, by ``perf_counter``."""
    times: List[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 200):
        start = time.perf_counter()
        run(0)
        times.append(1e6 * (time.perf_counter() - start))
    return median(times)


def host_us(calls: Sequence[Callable[[], object]], synchronize: Callable[[], object], bursts: int = 40) -> float:
    """Median us until an eager call returns to the host, over up to ``bursts`` rounds of ``calls`` (or HOST_SECONDS).

    A round is shorter than the queue of launches (1024), which would make the host wait for the device.
    """
    times: List[float] = []
    end = time.perf_counter() + HOST_SECONDS
    while not times or (len(times) < bursts and time.perf_counter() < end):
        synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        times.append(1e6 * (time.perf_counter() - start) / len(calls))
    synchronize()
    return median(times)


def event_us(work: Callable[[], object]) -> float:
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    work()
    after.record()
    torch.cuda.synchronize()
    return 1e3 * before.elapsed_time(after)


def measure_ceilings(device: torch.device) -> Ceilings:
    """Read bandwidth (GB/s) of one big buffer, and the rate (TFLOP/s) of a square matrix product on random data."""
    on_gpu = device.type == "cuda"
    dtype, side = (torch.bfloat16, 8192) if on_gpu else (torch.float32, 512)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    matmul_us = _median_us(lambda: torch.mm(a, b), on_gpu)
    num_bytes = (4 << 30) if on_gpu else (64 << 20)
    buffer = torch.ones(num_bytes // 4, device=device, dtype=torch.int32)
    reads: List[Callable[[], object]] = [lambda: torch.sum(buffer.view(torch.float32))]
    kernel = _triton_read(buffer) if on_gpu else None
    if kernel is not None:
        reads.append(kernel)
    read_us = min(_median_us(read, on_gpu) for read in reads)
    return Ceilings(read_gbps=num_bytes / read_us / 1e3, matmul_tflops=2 * side**3 / matmul_us / 1e6)


def _median_us(work: Callable[[], object], on_gpu: bool) -> float:
    for _ in range(3):
        work()
    if not on_gpu:
        return wall_us(lambda _: work())
    return median(event_us(work) for _ in range(10))


def _triton_read(buffer: torch.Tensor) -> Optional[Callable[[], object]]:
    """A kernel that only reads, since torch's reductions may stay below what the memory gives. None without Triton."""
    try:
        from .read_kernel import read_all
    except ImportError:
        return None
    return lambda: read_all(buffer)
