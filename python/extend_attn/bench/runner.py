"""Tasks in a child process, each under a time limit: a kernel that hangs costs seconds, not the session.

This side imports no torch. One worker serves task after task; when one exceeds its limit the worker's process group
is killed and the next task gets a fresh worker.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence

STARTUP_S = 120.0  # importing torch and making a CUDA context, on a cold and busy machine
WORKER = "extend_attn.bench.worker"
PACKAGE_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class WorkerProcess:
    """A worker that is started when first asked and restarted after a crash or a kill. Not for concurrent calls, except
    ``kill``."""

    def __init__(
        self,
        device: str,
        *,
        limit_s: float = 60.0,
        module: str = WORKER,
        environment: Optional[Mapping[str, str]] = None,
    ) -> None:
        """module: run with ``python -m`` and the device; environment: what its processes get beside this one's."""
        self.limit_s = limit_s
        self.command: Sequence[str] = (sys.executable, "-m", module, device)
        self.environment = dict(environment or {})
        self._child: Optional[subprocess.Popen] = None
        self._lines: queue.Queue[Optional[str]] = queue.Queue()
        self._log: Any = None

    def ask(self, task: Dict[str, Any], limit_s: Optional[float] = None) -> Dict[str, Any]:
        """The worker's answer; ``{"failed": why}`` if it took longer than the limit (seconds) or died."""
        limit = self.limit_s if limit_s is None else limit_s
        if self._child is None:
            self._start()
            started = self._exchange({"op": "hello"}, STARTUP_S)
            if "failed" in started:
                return started
        return self._exchange(task, limit)

    def _exchange(self, task: Dict[str, Any], limit: float) -> Dict[str, Any]:
        assert self._child is not None and self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(task) + "\n")
            self._child.stdin.flush()
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            self.stop()
            return {"failed": f"no answer within {limit:g} s; killed", "timed_out": True}
        except OSError:
            line = None
        if line is None:
            return {"failed": f"the worker died: {self._ended()}"}
        answer = json.loads(line)
        if answer.get("fatal"):
            self.stop()
        return answer

    def _start(self) -> None:
        environment = {**os.environ, **self.environment}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [PACKAGE_ROOT, environment.get("PYTHONPATH")]))
        self._log = tempfile.TemporaryFile(mode="w+")
        self._child = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            start_new_session=True,  # a group of its own: compilers it has started die with it
        )
        self._lines = queue.Queue()
        threading.Thread(target=_pump, args=(self._child.stdout, self._lines), daemon=True).start()

    def _ended(self) -> str:
        """How a worker that answers no more ended, with the last thing it said."""
        assert self._child is not None
        try:
            status: Any = self._child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            status = "still running"
        self._log.seek(0)
        said = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        self.stop()
        return f"status {status}" + (f", {said[-1][:300]}" if said else "")

    def kill(self) -> None:
        """End the worker's processes from another thread: the call that waits for it fails, and cleans up."""
        child = self._child
        if child is not None:
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def stop(self) -> None:
        """Kill the worker, if there is one."""
        self.kill()
        child, self._child = self._child, None
        if child is None:
            return
        child.wait()
        for pipe in (child.stdin, child.stdout):
            try:
                pipe.close()  # type: ignore[union-attr]
            except OSError:
                pass
        self._log.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _pump(pipe: Any, lines: queue.Queue[Optional[str]]) -> None:
    """Pass a pipe's lines on, and None at its end."""
    try:
        for line in pipe:
            lines.put(line)
    except ValueError:  # closed under our feet by stop()
        pass
    lines.put(None)


def compile_all(
    tasks: Iterable[Dict[str, Any]], device: str, jobs: int, limit_s: float, *, module: str = WORKER
) -> None:
    """Run each task's call once, in ``jobs`` workers side by side, so that what is timed later is compiled already.

    Failures say nothing here: the same task is measured afterwards, and says it then.
    """
    waiting: queue.Queue[Dict[str, Any]] = queue.Queue()
    for task in tasks:
        waiting.put({**task, "op": "compile"})

    def serve() -> None:
        with WorkerProcess(device, limit_s=limit_s, module=module) as worker:
            while True:
                try:
                    task = waiting.get_nowait()
                except queue.Empty:
                    return
                worker.ask(task)

    jobs = max(1, min(jobs, waiting.qsize()))
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        for future in [pool.submit(serve) for _ in range(jobs)]:
            future.result()


class Budget:
    """Seconds left of a run; without a limit there are always enough."""

    def __init__(self, seconds: Optional[float]) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def spent(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end


def tasks_of(rows: List[Any], providers: List[str], plans: Dict[str, List[Optional[Any]]], own: str) -> List[dict]:
    """Every measurement of a run, row by row: the library once a plan, each peer once."""
    tasks: List[dict] = []
    for row in rows:
        for provider in providers:
            for plan in plans.get(row.name, [None]) if provider == own else [None]:
                tasks.append({"op": "measure", "row": row.to_json(), "provider": provider, "plan": plan})
    return tasks
