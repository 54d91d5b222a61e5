"""The process of one rank, or of all virtual ranks: joins the others, then answers tasks like the attention bench."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any, Callable, Dict, List, Optional

import torch

from ..providers.base import OWN
from ..timing import event_us
from ..worker import TaskWorker, serve
from . import all_reduce, capturing, qknorm
from .providers import Providers
from .ranks import Ranks, join
from .step import StepBench

COPY_BYTES = 256 << 20  # of the peer-to-peer copy that shows what a link gives


class RankWorker(TaskWorker):
    """The measurements, on the ranks of this process."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks.device)
        self.ranks = ranks
        self.providers: Optional[Providers] = None
        self.steps: Optional[StepBench] = None
        self._tasks.update(setup=self.setup, ceilings=self.ceilings)
        for op, measure in (
            ("all_reduce", lambda task: all_reduce.measure(ranks, self._ready(), task)),
            ("qknorm", lambda task: qknorm.measure(ranks, self._ready(), task)),
            ("capture", lambda task: capturing.measure(ranks, self._ready(), task)),
            ("step", self.step),
        ):
            self._tasks[op] = self._with_choice(measure)

    def hello(self, task: dict) -> dict:
        answer = super().hello(task)
        if self.ranks.on_gpu:
            answer["versions"]["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[attr-defined]
        return answer

    def setup(self, task: dict) -> dict:
        """Make the communicators: collective, and where kernels are compiled. CPUs have none."""
        self.providers = Providers(self.ranks, task["largest"])
        self.steps = StepBench(self.ranks, self.providers)
        if not self.ranks.on_gpu:
            return {"link": "cpu"}
        dtypes = [getattr(torch, name) for name in task["dtypes"]]
        self.ranks.make_communicators(dtypes, max_bytes=task["largest"], timeout_s=task["timeout_s"])
        comm = self.ranks.members[0].comm
        return {"link": comm.link or "none", "arch": comm.arch}

    def ceilings(self, task: dict) -> dict:
        """What one direction of the link to the next GPU gives (GB/s): by its nominal rate, and in a large copy."""
        if not self.ranks.on_gpu or self.ranks.members[0].rank or torch.cuda.device_count() < self.ranks.world:
            return {}
        source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=self.device)
        target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=torch.device("cuda", 1))

        def copy() -> None:
            target.copy_(source, non_blocking=True)

        us = min(event_us(copy) for _ in range(5))
        return {"link_gbps": nvlink_rate(), "copy_gbps": round(COPY_BYTES / us / 1e3, 1)}

    def step(self, task: dict) -> dict:
        self._ready()
        assert self.steps is not None
        return self.steps.measure(task)

    def _ready(self) -> Providers:
        if self.providers is None:
            raise RuntimeError("setup comes before measurements")
        return self.providers

    def _with_choice(self, measure: Callable[[dict], dict]) -> Callable[[dict], dict]:
        """Adds what ``auto`` chose for the task's bytes, by mode."""

        def run(task: dict) -> dict:
            answer = measure(task)
            comm = self.ranks.members[0].comm
            if task["provider"] == OWN and task["algo"] == "auto" and comm is not None and "bytes" in task:
                key: Dict[str, Any] = dict(world_size=self.ranks.world, arch=comm.arch, link=comm.link)
                answer["chosen"] = {
                    mode: comm.policy.choose(nbytes=task["bytes"], mode=mode, **key).algo for mode in answer["us"]
                }
            return answer

        return run


def nvlink_rate() -> Optional[float]:
    """The nominal GB/s of all NVLinks of GPU 0, one direction, as nvidia-smi lists them; None without them."""
    try:
        shown = subprocess.run(["nvidia-smi", "nvlink", "-s", "-i", "0"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    rates = [float(rate) for rate in re.findall(r"Link \d+:\s*([\d.]+) GB/s", shown.stdout)]
    return round(sum(rates), 1) or None


def main(argv: Optional[List[str]] = None) -> int:
    device = (sys.argv[1:] if argv is None else argv)[0]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    return serve(lambda: RankWorker(join(device)))


if __name__ == "__main__":
    sys.exit(main())
