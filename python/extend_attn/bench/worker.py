"""The process that touches the device: reads tasks as JSON lines, answers each with one JSON line.

It is started once and serves a whole run, since starting torch costs seconds; the runner kills it when a task exceeds
its time, and starts another. Answers go to the process's first standard output; whatever libraries print goes to
standard error, so that it cannot break a line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from statistics import median
from typing import Any, Callable, Dict, List, Optional

import torch

from . import timing
from .check import error_of
from .data import Batch, make_batch
from .problems import Row
from .providers import OWN, PROVIDERS, Device, Skip

HOST_BURST = 100  # calls; up to four launches each fit into the queue


class TaskWorker:
    """Answers tasks by the name in ``op``; whatever goes wrong in one is its answer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tasks: Dict[str, Callable[[dict], dict]] = {"hello": self.hello, "hang": self.hang}

    def answer(self, task: dict) -> dict:
        """One task's result: its fields, or ``skipped`` or ``failed`` with the reason."""
        try:
            return self._tasks[task["op"]](task)
        except Skip as reason:
            return {"skipped": str(reason)}
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {first_line(error)}", "fatal": not self._device_works()}

    def hello(self, task: dict) -> dict:
        facts = self._device()
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        if torch.version.cuda:
            versions["cuda"] = torch.version.cuda
        try:
            import triton

            versions["triton"] = triton.__version__
        except ImportError:
            pass
        answer = {"device": facts.name, "type": facts.type, "versions": versions}
        if facts.type == "cuda":
            from ..devices import device_spec

            spec = device_spec(self.device)
            answer.update(arch=spec.arch, sm_count=spec.sm_count)
        return answer

    def hang(self, task: dict) -> dict:
        """Never answers within the asked seconds: what the runner's time limit is tested with."""
        time.sleep(task["seconds"])
        return {}

    def _device(self) -> Device:
        if self.device.type == "cuda":
            found = torch.cuda.get_device_properties(self.device)
            return Device("cuda", found.name, (found.major, found.minor))
        return Device("cpu", cpu_name())

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _device_works(self) -> bool:
        """After some errors (an illegal address) every later CUDA call of the process fails."""
        try:
            self._synchronize()
            return True
        except RuntimeError:
            return False


class Worker(TaskWorker):
    """Holds the tensors of the row in hand, so that its providers share them and the reference is computed once."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._batch: Optional[Batch] = None
        own = (self.ceilings, self.plans, self.compile, self.measure, self.host)
        self._tasks.update((task.__name__, task) for task in own)

    def hello(self, task: dict) -> dict:
        answer = super().hello(task)
        for name in task.get("providers", ()):
            answer["versions"].update(PROVIDERS[name].versions())
        return answer

    def ceilings(self, task: dict) -> dict:
        return timing.measure_ceilings(self.device)._asdict()

    def plans(self, task: dict) -> dict:
        from .providers.ours import swept_plans

        return swept_plans(self._batch_of(task), task["which"])

    def compile(self, task: dict) -> dict:
        """Run once and keep nothing: several workers do this at a time to fill the compilers' caches on disk."""
        batch = make_batch(Row.from_json(task["row"]), self.device, num_sets=1)
        prepared = self._provider(task, batch.row).prepare(batch, task.get("plan"))
        prepared.run(0)
        self._synchronize()
        return {}

    def measure(self, task: dict) -> dict:
        """Check, then time. ``failed`` if the result is wrong; it is never timed then."""
        row = Row.from_json(task["row"])
        provider = self._provider(task, row)
        batch = self._batch_of(task)
        prepared = provider.prepare(batch, task.get("plan"))
        batch.poison()
        error = error_of(prepared.rows(prepared.run(0)), batch.expected())
        answer = {"plan": prepared.plan, "problem": prepared.problem, "error": error.max}
        answer.update(us_graph=None, us_do_bench=None)
        if error.wrong:
            return {**answer, "failed": f"wrong result: {error}"}
        for i in range(1, len(batch.sets)):
            prepared.run(i)
        self._synchronize()
        if self.device.type != "cuda":
            return {**answer, "us_do_bench": timing.wall_us(prepared.run)}
        answer["us_do_bench"] = timing.do_bench_us(prepared.run)
        batch.poison()
        try:
            answer["us_graph"], returned = timing.graph_us(prepared.run, len(batch.sets))
        except RuntimeError as refused:
            if not self._device_works():
                raise
            return {**answer, "note": f"no graph: {first_line(refused)}"}
        again = error_of(prepared.rows(returned[0]), batch.expected())
        if again.wrong:
            return {**answer, "failed": f"wrong result after graph replay: {again}"}
        return answer

    def host(self, task: dict) -> dict:
        """Check, then time what an eager call costs the host: repeated, and with lengths that were not seen before."""
        row = Row.from_json(task["row"])
        provider = self._provider(task, row)
        batch = make_batch(row, self.device, num_sets=1)
        prepared = provider.prepare(batch, task.get("plan"))
        batch.poison()
        error = error_of(prepared.rows(prepared.run(0)), batch.expected())
        answer = {"plan": prepared.plan, "error": error.max}
        if error.wrong:
            return {**answer, "failed": f"wrong result: {error}"}
        call, other = prepared.call or partial(prepared.run, 0), prepared.other_lengths
        answer["us_host"] = timing.host_us([call] * HOST_BURST, self._synchronize)
        if other is not None:
            each = [timing.host_us([other(n)], self._synchronize, bursts=1) for n in range(1, HOST_BURST + 1)]
            answer["us_other_lengths"] = median(each)  # some begin a bucket of lengths, and are planned
        return answer

    def _provider(self, task: dict, row: Row) -> Any:
        provider = PROVIDERS[task.get("provider", OWN)]
        reason = provider.refuses(row, self._device())
        if reason:
            raise Skip(reason)
        return provider

    def _batch_of(self, task: dict) -> Batch:
        row = Row.from_json(task["row"])
        if self._batch is None or self._batch.row != row:
            self._batch = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._batch = make_batch(row, self.device)
        return self._batch


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else ""


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"


def serve(make_worker: Callable[[], TaskWorker]) -> int:
    """Answer the tasks that standard input brings, until it ends or an answer is ``fatal``; the exit status."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = make_worker()
    for line in sys.stdin:
        answer = worker.answer(json.loads(line))
        print(json.dumps(answer), file=answers, flush=True)
        if answer.get("fatal"):
            return 1
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    device = torch.device((sys.argv[1:] if argv is None else argv)[0])
    return serve(lambda: Worker(device))


if __name__ == "__main__":
    sys.exit(main())
