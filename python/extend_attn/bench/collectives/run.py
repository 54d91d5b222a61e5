"""One run: the team of ranks, the tasks of each kind in order, the files they fill."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import Any, Dict, List, Optional

from ...comm.policy import ENVIRONMENT
from .. import results
from ..runner import Budget
from . import table_rows
from . import tasks as kinds
from .arithmetic import ITEM_BYTES, LARGEST, bus_bandwidth
from .team import Team

SETUP_S = 90.0  # joining, and compiling the kernels where the cache has none
ENOUGH_FAILURES = 2  # of one provider's algorithm, or of a start: each costs a time limit and a start of all ranks
WAIT_S = 5.0  # what a kernel waits for a peer: a bench's ranks are never apart for long
STEP_TIMES = 4  # a step's time limit over others': weights to make, attention kernels to compile


@dataclass(frozen=True)
class Settings:
    """Times in seconds."""

    world: int
    virtual: bool
    device: str
    dtype: str
    timeout_s: float
    budget_s: Optional[float]
    out: Optional[str]
    table: Optional[str]


class Run:
    """``everything`` measures; ``failed`` says whether something went wrong."""

    def __init__(self, settings: Settings, command: str) -> None:
        self.settings, self.command = settings, command
        self.team = Team(settings.world, virtual=settings.virtual, device=settings.device, limit_s=settings.timeout_s)
        self.budget = Budget(settings.budget_s)
        self.failed = False
        self.started = time.monotonic()
        self._largest = LARGEST
        self._set_up = False
        self._facts: Dict[str, Any] = {}
        self._failures: Dict[Any, int] = {}

    def everything(self, work: Dict[str, List[Dict[str, Any]]]) -> Dict[str, Dict[str, Any]]:
        """kind -> its results file, written after each task; empty if the ranks can't even start."""
        self._largest = max([LARGEST, *(t.get("bytes", 0) for tasks in work.values() for t in tasks)])
        self._facts = self._start()
        if "failed" in self._facts:
            self.failed = True
            self.say(self._facts["failed"])
            return {}
        files = {}
        for kind, tasks in work.items():
            data = files[kind] = results.new_file(
                kind=kind,
                device=self._facts["device"],
                versions=self._facts["versions"],
                command=self.command,
                ceilings=self._facts["ceilings"],
            )
            learnt = False
            for number, task in enumerate(tasks):
                if kind == "all_reduce" and task["algo"] == kinds.AUTO and not learnt:
                    learnt = True
                    self._learn(data)
                self.measure(task, f"[{number + 1}/{len(tasks)}]", data)
                if self.settings.out:
                    results.save(data, self.path_of(kind, len(work)))
        return files

    def path_of(self, kind: str, of: int) -> str:
        root, suffix = os.path.splitext(self.settings.out or "")
        return f"{root}-{kind}{suffix or '.json'}" if of > 1 else str(self.settings.out)

    def measure(self, task: Dict[str, Any], count: str, data: Dict[str, Any]) -> None:
        """One task: its results and a line on standard error."""
        if self.budget.spent():
            answer: Dict[str, Any] = {"skipped": f"the budget of {self.settings.budget_s:g} s was spent"}
        else:
            answer = self._ask(task)
        reason = answer.get("skipped") or answer.get("failed") or answer.get("wrong")
        if reason:
            named = {name: value for name, value in task.items() if name != "op"}
            data["skipped"].append({**named, "reason": reason})
        self.failed = self.failed or "failed" in answer or "wrong" in answer
        if "us" in answer:
            data["results"].extend(self.lines_of(task, answer))
        times = ", ".join(f"{mode} {us:.2f} us" for mode, us in answer.get("us", {}).items())
        self.say(f"{count} {kinds.label(task)}: {', '.join(filter(None, [times, reason]))}")

    def _ask(self, task: Dict[str, Any]) -> Dict[str, Any]:
        """The ranks' answer; they are started first where there are none."""
        who = (task["op"], task["provider"], task["algo"])
        for what in (who, "start"):
            if self._failures.get(what, 0) >= ENOUGH_FAILURES:
                return {"skipped": f"it failed {ENOUGH_FAILURES} times before"}
        answer: Dict[str, Any] = {} if self._set_up else self._start()
        what = "start"
        if self._set_up:
            what = who
            answer = self.team.ask(task, self.settings.timeout_s * (STEP_TIMES if task["op"] == "step" else 1))
        if "failed" in answer:
            self._set_up = False
            self._failures[what] = self._failures.get(what, 0) + 1
        return answer

    def lines_of(self, task: Dict[str, Any], answer: Dict[str, Any]) -> List[Dict[str, Any]]:
        """A result for each mode that was timed, or one without a time where the result was wrong."""
        lines = []
        us_of = answer["us"] if "wrong" not in answer else {}
        for mode in us_of or ["eager"]:
            us = us_of.get(mode)
            error = answer.get("error")
            line = {name: value for name, value in task.items() if name != "op"}
            line.update(world=self.settings.world, virtual=self.settings.virtual, mode=mode)
            line["us"] = round(us, 3) if us else None
            if task["op"] == "all_reduce":
                gbps = bus_bandwidth(task["bytes"], self.settings.world, us) if us else None
                line["busbw_gbps"] = float(f"{gbps:.4g}") if gbps else None
                line["chosen"] = answer.get("chosen", {}).get(mode)
            line.update({name: answer[name] for name in ("collectives", "exchanges") if name in answer})
            line["error"] = error if error is not None and error < float("inf") else None
            lines.append(line)
        return lines

    def _start(self) -> Dict[str, Any]:
        """Ranks that are ready: their facts, or ``failed``."""
        hello = self.team.ask({"op": "hello"}, SETUP_S)
        setup = {"op": "setup", "dtypes": list(ITEM_BYTES), "largest": self._largest, "timeout_s": WAIT_S}
        made = hello if "failed" in hello else self.team.ask(setup, SETUP_S)
        rates = made if "failed" in made else (self._facts.get("ceilings") or self.team.ask({"op": "ceilings"}))
        if "failed" in rates:
            return rates
        self._set_up = True
        self.say(f"{self.settings.world} ranks on {hello['device']}, link {made['link']}")
        return {**hello, "ceilings": {"link": made["link"], "arch": made.get("arch", "cpu"), **rates}}

    def _learn(self, data: Dict[str, Any]) -> None:
        """Write the thresholds of what was measured, and start ranks that follow them."""
        if not self.settings.table:
            return
        ceilings = self._facts["ceilings"]
        if ceilings["link"] in ("cpu", "none"):
            self.say(f"no thresholds: there are none for link {ceilings['link']}")
            return
        try:
            rows = table_rows.rows_of(data, arch=ceilings["arch"], link=ceilings["link"]) if data["results"] else []
            table_rows.merge(self.settings.table, rows)
        except (OSError, ValueError) as error:
            self.failed = True
            self.say(f"no thresholds: {error}")
            return
        for row in rows:
            self.say(table_rows.describe(row))
        self.team.stop()
        self._set_up = False
        self.team.environment[ENVIRONMENT] = os.path.abspath(self.settings.table)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.1f} s {text}", file=sys.stderr, flush=True)
