"""The process that measures a plan of a problem: checked first, then timed by graph replay over rotated inputs."""

from __future__ import annotations

import dataclasses
import sys
from typing import Optional

import torch

from ...attention import run_plan
from ...devices import device_spec
from ...plan.tile import Plan
from ...problem import Problem
from ...warming import warmup
from .. import timing
from ..check import error_of
from ..worker import TaskWorker, serve
from .posed import Posed, pose


class TuningWorker(TaskWorker):
    """Holds the tensors of the problem in hand, so that its plans share them and the reference is computed once."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._posed: Optional[Posed] = None
        self._tasks.update((task.__name__, task) for task in (self.spec, self.compile, self.measure))

    def spec(self, task: dict) -> dict:
        return {"spec": dataclasses.asdict(device_spec(self.device))}

    def compile(self, task: dict) -> dict:
        """Run small stand-ins: several workers do this at a time to fill Triton's cache on disk."""
        warmup([Problem.from_json(task["problem"])], device=self.device, plan=Plan.from_json(task["plan"]))
        return {}

    def measure(self, task: dict) -> dict:
        """``us`` of one call. ``failed`` if the result is wrong; it is never timed then."""
        problem, plan = Problem.from_json(task["problem"]), Plan.from_json(task["plan"])
        posed = self._posed_for(problem)

        def run(i: int) -> None:
            run_plan(plan, posed.sets[i], problem, explicit=True)

        posed.poison()
        for i in range(len(posed.sets)):
            run(i)
        error = self._error(posed)
        if error.wrong:
            return {"failed": f"wrong result: {error}"}
        if self.device.type != "cuda":
            us = timing.wall_us(run)
        else:
            posed.poison()
            burst_us = task.get("burst_us") or timing.BURST_US
            us, _ = timing.graph_us(run, len(posed.sets), burst_us=burst_us, drop_us=task.get("drop_us"))
            error = self._error(posed)
            if error.wrong:
                return {"failed": f"wrong result after graph replay: {error}"}
        return {"us": us, "error": error.max, "new": posed.new, "prefix": posed.prefix}

    def _error(self, posed: Posed):
        used = posed.problem.batch_size * posed.new
        return error_of(posed.sets[0].o[:used], posed.expected()[:used])

    def _posed_for(self, problem: Problem) -> Posed:
        if self._posed is None or self._posed.problem != problem:
            self._posed = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._posed = pose(problem, self.device)
        return self._posed


if __name__ == "__main__":
    sys.exit(serve(lambda: TuningWorker(torch.device(sys.argv[1]))))
