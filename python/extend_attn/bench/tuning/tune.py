"""Measures each problem's sweep and writes the fastest plan into a table. Imports no torch: that is in the workers."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from typing import Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ...plan.device import DeviceSpec
from ...plan.select import select
from ...plan.tables import same_minor_version
from ...plan.tile import Plan
from ...problem import Problem
from ..results import new_file
from ..runner import Budget, WorkerProcess, compile_all
from ..tuned import merge, winners
from .sweep import defaults, steps

WORKER = "extend_attn.bench.tuning.worker"
GROUP = 256  # problems whose kernels are compiled side by side
TOO_SLOW = 1.5  # times the fastest so far: such a plan is timed once
CLOSE, MOST_AGAIN = 1.1, 5  # times the fastest of all, and how many: such plans are timed a second time


@dataclasses.dataclass
class Limits:
    """timeout: seconds of one measurement, compilation included; budget: seconds after which no further problem is
    begun; jobs: processes that compile beforehand; burst_us: measured time of one figure (None: as in the bench)."""

    timeout: float = 60.0
    budget: Optional[float] = None
    jobs: int = 8
    burst_us: Optional[float] = None


class Trial(NamedTuple):
    """A plan that was measured: ``us`` of one call, or None and why not. ``wrong``: its result was."""

    plan: Plan
    us: Optional[float]
    reason: Optional[str]

    @property
    def wrong(self) -> bool:
        return self.reason is not None and self.reason.startswith("wrong result")


class Tuner:
    """A worker, the facts of its machine, and measurements made with it."""

    def __init__(self, device: str, limits: Limits) -> None:
        self.device, self.limits = device, limits
        self.worker = WorkerProcess(device, limit_s=limits.timeout, module=WORKER)
        self.budget = Budget(limits.budget)
        self.started = time.monotonic()

    def __enter__(self) -> Tuner:
        facts, spec = self.worker.ask({"op": "hello"}), self.worker.ask({"op": "spec"})
        for answer in (facts, spec):
            if "failed" in answer:
                self.worker.stop()
                raise RuntimeError(f"device: nothing can be measured on {self.device}: {answer['failed']}")
        self.versions, self.name = facts["versions"], facts["device"]
        # what is measured in the interpreter, for tests, speaks for no GPU
        self.arch, self.sm_count = facts.get("arch", "interpreter"), facts.get("sm_count", 1)
        self.spec = DeviceSpec(**spec["spec"])
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.stop()

    def compile(self, wanted: Iterable[Tuple[Problem, Iterable[Plan]]]) -> int:
        """Compiles what these plans launch, in processes side by side; returns how many there are to compile."""
        tasks: Dict[Any, Dict[str, Any]] = {}
        for problem, plans in wanted:
            for plan in plans:
                task = {"problem": problem.to_json(), "plan": plan.to_json()}
                tasks.setdefault((_variant(problem), _kernel(plan)), task)
        if self.limits.jobs > 1 and tasks:
            self.say(f"compiling for {len(tasks)} plans in {self.limits.jobs} processes")
            compile_all(tasks.values(), self.device, self.limits.jobs, self.limits.timeout, module=WORKER)
        return len(tasks)

    def each(self, plans: Mapping[Problem, Iterable[Plan]]) -> Iterator[Tuple[Problem, List[Trial]]]:
        """Compiles, then measures these plans of each problem, as many problems as the budget allows."""
        self.compile(plans.items())
        for number, problem in enumerate(plans):
            if self.budget.spent():
                left = len(plans) - number
                self.say(f"the budget of {self.limits.budget:g} s is spent; the same command goes on: {left} left")
                return
            yield problem, self.measure(problem, plans[problem])

    def sweeps(self, problems: Sequence[Problem]) -> Iterator[Tuple[Problem, List[Trial]]]:
        """Both rounds of each problem, the library's choice first; those of GROUP problems at a time, so that what
        they need is compiled side by side and a run that is cut short has finished some. Where the budget is spent
        before the start, nothing but compiling: the second round as if the choice were the fastest, and the first."""
        for start in range(0, len(problems), GROUP):
            plans = {problem: defaults(problem, self.spec)[0] for problem in problems[start : start + GROUP]}
            if self.budget.spent():
                self.compile((p, steps(p, self.spec, [(first[0], 1.0)])) for p, first in plans.items())
            further = []
            for problem, trials in self.each(plans):
                further.append((problem, trials, steps(problem, self.spec, [(t.plan, t.us) for t in trials])))
            self.compile((problem, more) for problem, _, more in further)
            for problem, trials, more in further:
                best = best_of(trials)
                drop_us = best.us * TOO_SLOW if best is not None and best.us else None
                yield problem, self.again(problem, [*trials, *self.measure(problem, more, drop_us)])

    def measure(self, problem: Problem, plans: Iterable[Plan], drop_us: Optional[float] = None) -> List[Trial]:
        """Each plan checked, then timed; one whose first replay takes more than ``drop_us`` is not timed further."""
        trials = []
        for plan in plans:
            task: Dict[str, Any] = {"op": "measure", "problem": problem.to_json(), "plan": plan.to_json()}
            task.update(burst_us=self.limits.burst_us, drop_us=drop_us)
            answer = self.worker.ask(task)
            trials.append(Trial(plan, answer.get("us"), answer.get("skipped") or answer.get("failed")))
        return trials

    def again(self, problem: Problem, trials: List[Trial]) -> List[Trial]:
        """The fastest few, and the first, timed once more, last one first: the lower figure counts. A problem's first
        plan is timed when the GPU comes from the reference, and took up to a tenth longer than the same work later."""
        best = best_of(trials)
        if best is None or best.us is None:
            return trials
        close = sorted((t for t in trials if t.us is not None and t.us <= best.us * CLOSE), key=lambda t: t.us or 0.0)
        few = [t for t in trials if t in close[:MOST_AGAIN] or (t is trials[0] and t.us is not None)]
        second = {t.plan: t for t in self.measure(problem, [t.plan for t in reversed(few)])}
        return [_lower(t, second[t.plan]) if t.plan in second else t for t in trials]

    def complain(self, problem: Problem, trials: Sequence[Trial]) -> None:
        """What did not run, or was wrong."""
        for trial in trials:
            if trial.reason is not None:
                self.say(f"  {describe(problem)}: {trial.plan}: {trial.reason}")
        if best_of(trials) is None:
            self.say(f"{describe(problem)}: no plan of {len(trials)} runs")

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.1f} s {text}", file=sys.stderr, flush=True)


def _lower(first: Trial, second: Trial) -> Trial:
    """Of two measurements of a plan the shorter one, or the one that failed."""
    return min(first, second, key=lambda trial: trial.us or 0.0)


def _variant(problem: Problem) -> Problem:
    """The problem without the sizes that no kernel is specialised for."""
    return dataclasses.replace(
        problem,
        batch_size=min(problem.batch_size, 2),
        num_tokens=1,
        max_len_extend=1,
        num_kv_indices=min(problem.num_kv_indices, 1),
        max_len_prefix=None if problem.max_len_prefix else problem.max_len_prefix,
        sliding_window=min(problem.sliding_window, 1),
    )


def _kernel(plan: Plan) -> Plan:
    """The plan without the numbers that no kernel is specialised for."""
    return plan.merged({"split_kv": min(plan.split_kv, 2), "programs": min(plan.programs, 1)})


def best_of(trials: Sequence[Trial]) -> Optional[Trial]:
    """The fastest right one."""
    return min((t for t in trials if t.us is not None), key=lambda t: t.us or 0.0, default=None)


def tune(
    problems: Sequence[Problem], device: str, limits: Limits, *, table: str, command: str, again: bool = False
) -> int:
    """Measures the problems that ``table`` has no row of this device and Triton for (``again``: all), and writes a row
    after each, so that a run that is cut short, or out of budget, is gone on with by the same command.

    Returns 0; 1 if a result was wrong or a problem has no plan that runs. RuntimeError if there is no device,
    ValueError for a table of another architecture.
    """
    failed = False
    with Tuner(device, limits) as tuner:
        done = [] if again else measured_in(table, tuner.name, tuner.spec.triton)
        left = [problem for problem in problems if problem.to_json() not in done]
        tuner.say(f"{len(left)} of {len(problems)} problems to measure on {tuner.name}; rows go to {table}")
        header = new_file(device=tuner.name, versions=tuner.versions, command=command, ceilings={})
        for number, (problem, trials) in enumerate(tuner.sweeps(left)):
            best, choice = best_of(trials), trials[0]
            tuner.complain(problem, trials)
            failed = failed or best is None or any(trial.wrong for trial in trials)
            if best is None:
                continue
            merge(table, tuner.arch, winners(_timed(problem, trials, tuner.spec), header, tuner.sm_count))
            of = f"[{number + 1}/{len(left)}] {describe(problem)}"
            tuner.say(f"{of}: {_comparison(choice, best)}, of {len(trials)} plans")
    return int(failed)


def _timed(problem: Problem, trials: Sequence[Trial], device: DeviceSpec) -> List[Dict[str, Any]]:
    """The trials with a time, as ``winners`` takes them: it asks which plan is the heuristic's own."""
    own = select(problem, device, plan="heuristic")
    plans = [(own if trial.plan == own else trial.plan, trial.us) for trial in trials]
    return [{"problem": problem.to_json(), "plan": plan.to_json(), "us_graph": us} for plan, us in plans if us]


def _comparison(choice: Trial, best: Trial) -> str:
    before = "does not run" if choice.us is None else f"{choice.us:.1f} us"
    return f"{best.us:.1f} us with {best.plan} (the choice so far, {choice.plan} [{choice.plan.source}], {before})"


def measured_in(table: str, device: str, triton: str) -> List[Dict[str, Any]]:
    """The problems that a table has a row of this device and Triton for."""
    if not os.path.exists(table):
        return []
    with open(table, encoding="utf-8") as file:
        rows = json.load(file).get("rows", [])
    alike = (row for row in rows if row["device"] == device and same_minor_version(row["triton"], triton))
    return [row["problem"] for row in alike]


def describe(problem: Problem) -> str:
    """The problem in a few words: ``32 x 4 new, 32000 slots, window 1023, 8/4 heads of 256, bfloat16``."""
    p = problem
    dim = f"{p.head_dim_qk}" if p.head_dim_v == p.head_dim_qk else f"{p.head_dim_qk}/{p.head_dim_v}"
    parts = [f"{p.batch_size} x {p.max_len_extend} new", f"{p.num_kv_indices} slots"]
    parts += [f"window {p.sliding_window}"] if p.sliding_window > 0 else []
    parts += [f"{p.num_q_heads}/{p.num_kv_heads} heads of {dim}"]
    parts += [p.dtype if p.kv_dtype == p.dtype else f"{p.dtype} over {p.kv_dtype}"]
    flags = ("custom_mask", "sinks", "return_lse", "unified", "q_positions", "v_aliases_k_pool")
    return ", ".join([*parts, *[name for name in flags if getattr(p, name)]])
