"""One rank of tests/test_comm_processes.py: real processes, real CUDA IPC, on one GPU or on several.

``python comm_worker.py SCENARIO RANK WORLD PORT``; the last line it prints is JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings

import torch
import torch.distributed as dist

from extend_attn import fused_parallel_qknorm
from extend_attn.comm import CommError, CustomAllReduce, Policy

ALGOS = ["one_shot_push", "one_shot_pull", "two_shot_pull"]
DEADLY = "one_shot_pull"  # rank 1 dies while it waits in such a call; a push would have given the others all they need


def expected(world: int, count: int, dtype: torch.dtype, seed: int):
    """Inputs of all ranks and their sum: small whole numbers."""
    inputs = [
        torch.randint(-8, 9, (count,), generator=torch.Generator().manual_seed(seed * 64 + r)) for r in range(world)
    ]
    return [x.to(dtype) for x in inputs], sum(inputs).to(dtype)


def calls(comm, rounds: int = 40) -> int:
    """Eager calls of every kind, each checked; their number."""
    done = 0
    for number in range(rounds):
        for algo in ALGOS:
            count = (1, 17, 4099, 65_536)[number % 4]
            dtype = (torch.bfloat16, torch.float16, torch.float32)[number % 3]
            inputs, want = expected(comm.world_size, count, dtype, number)
            out = comm.all_reduce(inputs[comm.rank].to(comm.device), algo=algo)
            assert torch.equal(out.cpu(), want), (algo, count, dtype)
            done += 1
        q = torch.full((3, 128), 2.0, dtype=torch.bfloat16, device=comm.device)
        k = torch.full((3, 64), 4.0, dtype=torch.bfloat16, device=comm.device)
        one = torch.ones(128, dtype=torch.bfloat16, device=comm.device)
        fused_parallel_qknorm(comm, q, k, one, one[:64], 0.0)
        assert (q == 1).all() and (k == 1).all()
        done += 1
    comm.check()
    return done


def graphs(comm) -> dict:
    """Two captures, replays with changing inputs and eager calls between them."""
    made = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for number, counts in enumerate([(4096, 17, 70_000), (1000, 1000)]):
            graph, xs, ys = torch.cuda.CUDAGraph(), [], []
            xs = [torch.empty(count, dtype=torch.bfloat16, device=comm.device) for count in counts]
            with comm.capture(), torch.cuda.graph(graph):
                for layer, x in enumerate(xs):
                    y = x * 1  # in the graph's own pool
                    ys.append(comm.all_reduce(y, algo=ALGOS[(layer + number) % 3], out=y if layer == 1 else None))
            made.append((graph, xs, ys))
    for loop in range(12):
        for graph, xs, ys in made:
            wants = []
            for layer, x in enumerate(xs):
                inputs, want = expected(comm.world_size, x.numel(), torch.bfloat16, 100 * loop + layer)
                x.copy_(inputs[comm.rank])
                wants.append(want)
            graph.replay()
            for y, want in zip(ys, wants):
                assert torch.equal(y.cpu(), want), (loop, y.numel())
        if loop % 4 == 0:
            calls(comm, 1)
    del made, graph, xs, ys
    torch.cuda.empty_cache()
    calls(comm, 2)
    return {"copied": any("copied first" in str(w.message) for w in said)}


def die() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def survivor(comm, seconds: float) -> dict:
    """What the others see after rank 1's death: an exception within the timeout, and a close() that returns.

    The first call is the one that rank 1 may have died in: another would be a disagreement, which its header proves.
    """
    start = time.monotonic()
    x = torch.ones(5000, dtype=torch.bfloat16, device=comm.device)
    said = []
    for algo in (DEADLY, *ALGOS):
        try:
            comm.all_reduce(x, algo=algo)
            comm.check()
            said.append("nothing")
        except CommError as error:
            said.append(type(error).__name__)
    took = time.monotonic() - start
    comm.close()
    return {"said": said, "in_time": took < seconds}


def disagree(comm) -> dict:
    """The ranks make the same two calls in different orders."""
    x = torch.ones(5000, dtype=torch.bfloat16, device=comm.device)
    counts = (4096, 5000) if comm.rank else (5000, 4096)
    for count in counts:
        try:
            out = comm.all_reduce(x[:count], algo="one_shot_push")
            comm.check()
        except CommError as error:
            return {"said": f"{type(error).__name__}: {error}", "nan": bool(out.isnan().all())}
    return {"said": "nothing"}


def fall_back(comm, world: int, nccl: bool) -> dict:
    """A message larger than max_bytes, eager and captured."""
    inputs, want = expected(world, 1 << 20, torch.float32, 5)
    x = inputs[comm.rank].to(comm.device)
    found = {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            assert not comm.can_reduce(x)
            assert torch.equal(comm.all_reduce(x).cpu(), want)
    found["said"] = [str(w.message) for w in said]
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            y = comm.all_reduce(x)
        graph.replay()
        found["captured"] = torch.equal(y.cpu(), want)
    except RuntimeError as error:
        found["captured"] = str(error)
    if nccl:
        return found
    torch.cuda.synchronize()
    calls(comm, 1)
    return found


def run(scenario: str, rank: int, world: int, group) -> dict:
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    arguments = {
        "dtypes": (torch.bfloat16, torch.float16, torch.float32),
        "max_bytes": 1 << 20,
        "max_push_bytes": 1 << 20,
    }
    timeout_s = 2.0 if scenario.startswith("kill") else 60.0
    if scenario == "options" and rank == 1:
        arguments["max_bytes"] = 1 << 19
    if scenario == "off" and rank == 1:
        os.environ["EXTEND_ATTN_ALL_REDUCE"] = "off"
    comm = CustomAllReduce(group, device, timeout_s=timeout_s, **arguments)
    found = {"link": comm.link}
    if scenario == "calls":
        found["calls"] = calls(comm)
    elif scenario == "graphs":
        found.update(graphs(comm))
    elif scenario == "kill":  # between two calls
        calls(comm, 2)
        if rank == 1:
            die()
        found.update(survivor(comm, 20))
    elif scenario == "kill waiting":  # while its kernel waits for the others
        calls(comm, 2)
        if rank == 1:
            comm.all_reduce(torch.ones(5000, dtype=torch.bfloat16, device=device), algo=DEADLY)
            time.sleep(0.2)
            die()
        time.sleep(1.0)
        found.update(survivor(comm, 20))
    elif scenario == "off":
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                inputs, want = expected(world, 1000, torch.float32, 5)
                x = inputs[rank].to(device)
                assert not comm.can_reduce(x)
                assert torch.equal(comm.all_reduce(x).cpu(), want)
        found["said"] = [str(w.message) for w in said]
        try:
            comm.all_reduce(x, algo="one_shot_push")
        except RuntimeError as error:
            found["explicit"] = str(error)
    elif scenario == "disagree":
        found.update(disagree(comm))
    elif scenario in ("too large", "too large, nccl"):
        found.update(fall_back(comm, world, "nccl" in scenario))
    elif scenario == "reset":
        # Rank 0 is alone in a call until its timeout; then all reset.
        comm.close()
        comm = CustomAllReduce(group, device, timeout_s=3.0, **arguments)
        if rank == 0:
            comm.all_reduce(torch.ones(100, dtype=torch.bfloat16, device=device), algo="one_shot_push")
            try:
                comm.check()
            except CommError as error:
                found["raised"] = str(error)
        dist.barrier(group)
        comm.reset()
        found["works"] = torch.equal(
            comm.all_reduce(torch.ones(8, dtype=torch.bfloat16, device=device), algo="one_shot_push").cpu(),
            torch.full((8,), float(world), dtype=torch.bfloat16),
        )
    elif scenario == "policy":
        other = Policy.load() if rank == 0 else Policy(())
        try:
            comm.policy = other
            found["replaced"] = True
        except CommError as error:
            found["raised"] = str(error)
    if scenario == "close":
        calls(comm, 2)
        if rank == 0:
            comm.close()  # others close at interpreter exit
    elif not scenario.startswith("kill"):
        dist.barrier(group)
        if rank != 1:
            comm.close()
    return found


def main() -> None:
    scenario, rank, world, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if "nccl" in scenario else "gloo", rank=rank, world_size=world)
    try:
        found = run(scenario, rank, world, dist.group.WORLD)
    except Exception as error:
        import traceback

        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
