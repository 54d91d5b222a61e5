"""The communicator in real processes with CUDA IPC: on one GPU they take turns, so nothing here is about time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

import pytest
import torch
from ranks import TORCHRUN

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(TORCHRUN, reason="starts its own processes")]

WORKER = Path(__file__).with_name("comm_worker.py")


def run(scenario: str, world: int = 2, **environment: str) -> List[Dict]:
    """What each rank printed; a rank that was killed printed nothing: {}."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = [str(WORKER.parent.parent / "python"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), scenario, str(rank), str(world), str(port)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    found = []
    try:
        for rank, process in enumerate(processes):
            out, err = process.communicate(timeout=150)
            killed = scenario.startswith("kill") and rank == 1
            assert killed or process.returncode == 0, f"rank {rank} ended with {process.returncode}\n{out}\n{err}"
            lines = [line for line in out.splitlines() if line.startswith("{")]
            found.append(json.loads(lines[-1]) if lines else {})
            assert killed or "error" not in found[-1] or scenario == "options", f"rank {rank}: {found[-1]}\n{err}"
    finally:
        for process in processes:
            process.kill()
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_calls(world):
    assert [rank["calls"] for rank in run("calls", world)] == [160] * world


def test_graphs():
    """Inputs in torch's default segments are registered, by one exchange of handles a capture, and read through IPC."""
    assert [(rank["copied"], rank["exchanges"]) for rank in run("graphs")] == [(False, 2)] * 2


@pytest.mark.parametrize("allocator", ["expandable_segments:True", "backend:cudaMallocAsync"])
def test_graphs_of_memory_that_cannot_be_shared(allocator):
    """Those inputs are copied in, and the caller is told."""
    assert [rank["copied"] for rank in run("graphs", PYTORCH_CUDA_ALLOC_CONF=allocator)] == [True, True]


@pytest.mark.parametrize("scenario", ["kill", "kill waiting"])
def test_a_killed_peer(scenario):
    survivor = run(scenario)[0]
    assert survivor["said"] and set(survivor["said"]) <= {"CommTimeout", "PeerLost"}
    assert survivor["in_time"]


def test_close_in_any_order():
    """One rank closes at once, the other at interpreter exit."""
    run("close")


def test_constructed_differently():
    for rank in run("options"):
        assert "different max_bytes (rank 0: 1048576, rank 1: 524288)" in rank["error"]


def test_switched_off_on_one_rank():
    """All ranks fall back, say it once, and an algorithm asked for by name is an error."""
    for rank in run("off"):
        assert len(rank["said"]) == 1 and "EXTEND_ATTN_ALL_REDUCE=off" in rank["said"][0]
        assert "one_shot_push can't run: EXTEND_ATTN_ALL_REDUCE=off" in rank["explicit"]


def test_calls_in_another_order():
    for rank in run("disagree"):
        assert rank["said"].startswith("CommDisagreement") and rank["nan"]
        assert "of 4096 bfloat16" in rank["said"] and "of 5000 bfloat16" in rank["said"]


def test_too_large_for_the_kernels():
    """torch.distributed does it, which is said once; gloo can't be captured, and the error says so."""
    for rank in run("too large"):
        assert len(rank["said"]) == 1 and "more than max_bytes=1048576" in rank["said"][0]
        assert "backend gloo can't be captured" in rank["captured"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each rank")
def test_too_large_for_the_kernels_under_nccl():
    for rank in run("too large, nccl"):
        assert len(rank["said"]) == 1 and rank["captured"] is True


def test_reset():
    first, second = run("reset")
    assert "nothing from rank 1 within 3 s" in first["raised"]
    assert first["works"] and second["works"]


def test_policies_are_compared():
    for rank in run("policy"):
        assert "replaced" in rank or "different" in rank["raised"]
