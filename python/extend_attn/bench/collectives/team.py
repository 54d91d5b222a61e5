"""The ranks of a run as processes, each task under a time limit: a collective that hangs costs seconds, not a session.

One process a rank, or one for all virtual ranks. A task goes to all of them; when one fails or exceeds its limit, all
are killed, since its peers wait for it, and the next task gets a fresh team. Imports no torch.
"""

from __future__ import annotations

import os
import socket
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Dict, List, Mapping, Optional, Set

from ..runner import WorkerProcess

WORKER = "extend_attn.bench.collectives.worker"
GRACE_S = 3.0  # for the other ranks to answer once one has failed
# NVLink multicast (NVLS, multimem) is a different machine: kernels that use it are not measured here.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
VIRTUAL = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}  # a hardware queue for each rank's stream
# A launcher's variables that would send the ranks to the launcher's store instead of their own.
FOREIGN = ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID")


class Team:
    """``world`` ranks on ``device`` ("cuda" or "cpu"); ``virtual``: all in one process, on one GPU."""

    def __init__(self, world: int, *, virtual: bool, device: str, limit_s: float) -> None:
        self.world, self.virtual, self.device, self.limit_s = world, virtual, device, limit_s
        self.environment: Dict[str, str] = {}  # for what is started from now on
        self._workers: List[WorkerProcess] = []

    def ask(self, task: Mapping[str, Any], limit_s: Optional[float] = None) -> Dict[str, Any]:
        """The ranks' answers as one (``merged``); ``failed`` with the reason if one failed, hung or died."""
        if not self._workers:
            self._workers = self._processes()
        with ThreadPoolExecutor(len(self._workers)) as pool:
            futures = {pool.submit(worker.ask, dict(task), limit_s): worker for worker in self._workers}
            try:
                self._wait(futures)
            except BaseException:  # an interrupt: the pool would wait for the workers, which may hang
                for worker in self._workers:
                    worker.kill()
                raise
        answers = [future.result() for future in futures]
        if any("failed" in answer for answer in answers):
            self.stop()
        return merged(answers)

    def _wait(self, futures: Dict[Future, WorkerProcess]) -> None:
        """Until all have answered; once one has failed the others get GRACE_S and are killed then."""
        pending: Set[Future] = set(futures)
        failed = False
        while pending:
            done, pending = wait(pending, timeout=GRACE_S if failed else None, return_when=FIRST_COMPLETED)
            if failed and not done:
                for future in pending:
                    futures[future].kill()
            failed = failed or any("failed" in future.result() for future in done)

    def _processes(self) -> List[WorkerProcess]:
        port = _free_port()
        common = {**{name: os.environ.get(name, value) for name, value in NO_MULTICAST.items()}, **self.environment}
        common.update({name: "" for name in FOREIGN if name in os.environ})
        if self.virtual:
            one = {**VIRTUAL, **common, "EXTEND_ATTN_BENCH_VIRTUAL_RANKS": str(self.world)}
            return [WorkerProcess(self.device, limit_s=self.limit_s, module=WORKER, environment=one)]
        return [
            WorkerProcess(
                self.device,
                limit_s=self.limit_s,
                module=WORKER,
                environment={
                    **common,
                    "EXTEND_ATTN_BENCH_VIRTUAL_RANKS": "",
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(self.world),
                    "LOCAL_WORLD_SIZE": str(self.world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
            )
            for rank in range(self.world)
        ]

    def stop(self) -> None:
        """Kill all ranks; the next task starts new ones."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.stop()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def merged(answers: List[Dict[str, Any]]) -> Dict[str, Any]:
    """One answer of all ranks': the slowest rank's time of each mode, the largest error, the rest of rank 0.

    ``failed`` wins over ``skipped``, that over a result; the first rank's reason is given.
    """
    for word in ("failed", "skipped"):
        reasons = [(rank, answer[word]) for rank, answer in enumerate(answers) if word in answer]
        if reasons:
            rank, reason = min(reasons, key=lambda one: ("died" in one[1] or "within" in one[1], one[0]))
            return {word: f"rank {rank}: {reason}" if len(answers) > 1 else reason}
    found = dict(answers[0])
    if "us" in found:
        modes = [mode for mode in found["us"] if all(answer["us"].get(mode) is not None for answer in answers)]
        found["us"] = {mode: max(answer["us"][mode] for answer in answers) for mode in modes}
    if found.get("error") is not None:
        found["error"] = max(answer["error"] for answer in answers)
    wrong = [answer["wrong"] for answer in answers if answer.get("wrong")]
    return {**found, **({"wrong": wrong[0]} if wrong else {})}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
