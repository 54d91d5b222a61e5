"""How good the choice is where nothing was measured: random problems, each swept, the choice held against the best.

Problems are drawn from few classes of (head dim, type, heads), since kernels are compiled for each; sizes are drawn
log-uniformly. The same seed draws the same problems.
"""

from __future__ import annotations

import json
import math
import os
import random
from dataclasses import replace
from statistics import median
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ...plan.select import select
from ...plan.tables import same_minor_version
from ...plan.tile import Plan
from ...problem import Problem
from .tune import Limits, Trial, Tuner, best_of, describe

# At most 10 % slower than the best of the sweep is what the choice is held to.
TOLERANCE = 1.10
BURST_US = 8000.0  # measured time of one figure: some hundred calls of a short kernel
MOST_SLOTS = 1 << 18  # prefix tokens of a batch
MOST_TOKENS = 1 << 14  # new tokens of a batch

_BF16 = dict(dtype="bfloat16")
CLASSES: Dict[str, Dict[str, Any]] = {
    "d256 8/4": dict(_BF16, head_dim_qk=256, head_dim_v=256, num_q_heads=8, num_kv_heads=4),
    "d128 32/8": dict(_BF16, head_dim_qk=128, head_dim_v=128, num_q_heads=32, num_kv_heads=8),
    "d128 28/4": dict(_BF16, head_dim_qk=128, head_dim_v=128, num_q_heads=28, num_kv_heads=4),
    "d64 16/16": dict(_BF16, head_dim_qk=64, head_dim_v=64, num_q_heads=16, num_kv_heads=16),
    "d512 8/2": dict(_BF16, head_dim_qk=512, head_dim_v=512, num_q_heads=8, num_kv_heads=2),
    "d128 32/8 e4m3": dict(
        _BF16, head_dim_qk=128, head_dim_v=128, num_q_heads=32, num_kv_heads=8, kv_dtype="float8_e4m3fn"
    ),
}


# Windows that models of a class have beside full attention.
WINDOWS = {"d256 8/4": 1023, "d64 16/16": 127}


def draw(count: int, seed: int) -> List[Tuple[str, Problem]]:
    """(class, problem) of each: decode, verification, chunks and prompts, with and without prefix and window."""
    pick = random.Random(seed)

    def around(low: int, high: int) -> int:
        return round(math.exp(pick.uniform(math.log(low), math.log(high))))

    drawn = []
    for i in range(count):
        name = list(CLASSES)[i % len(CLASSES)]
        fp8 = "kv_dtype" in CLASSES[name]  # of a pool, which a prompt does not read
        kind = pick.choice(["decode", "verify", "chunk", "chunk" if fp8 else "prompt"])
        new = {"decode": 1, "verify": around(2, 16), "chunk": around(32, 2048), "prompt": around(64, 8192)}[kind]
        batch = around(1, max(1, min(128, MOST_TOKENS // new)))
        prefix = 0 if kind == "prompt" else around(16, max(17, min(32000, MOST_SLOTS // batch)))
        problem = Problem(
            **CLASSES[name],
            batch_size=batch,
            num_tokens=batch * new,
            max_len_extend=new,
            num_kv_indices=batch * prefix,
            sliding_window=pick.choice([-1, WINDOWS.get(name, -1)]),
        )
        drawn.append((name, problem))
    return drawn


class Outcome(NamedTuple):
    """A drawn problem's sweep. us of the choice, of the heuristic without tables, of the best plan, and of each."""

    name: str
    problem: Problem
    choice: Plan
    choice_us: Optional[float]
    heuristic_us: Optional[float]
    best: Plan
    best_us: float
    plans: Dict[str, Optional[float]]

    def to_json(self) -> Dict[str, Any]:
        plans = {name: getattr(self, name).to_json() for name in ("problem", "choice", "best")}
        return {**self._asdict(), **plans}

    @classmethod
    def from_json(cls, data: Dict[str, Any]) -> Outcome:
        values = {name: data[name] for name in cls._fields}
        values.update(problem=Problem.from_json(data["problem"]))
        values.update({name: Plan.from_json(data[name]) for name in ("choice", "best")})
        return cls(**values)


def evaluate(count: int, seed: int, device: str, limits: Limits, out: Optional[str] = None) -> int:
    """Sweeps ``count`` drawn problems and prints the share whose choice is within TOLERANCE of the best.

    ``out`` gets a line of JSON after each; a later run with the same file goes on where it ended. Returns 0; 1 if a
    result was wrong or no plan ran.
    """
    drawn = draw(count, seed)
    limits = replace(limits, burst_us=BURST_US if limits.burst_us is None else limits.burst_us)
    failed = False
    with Tuner(device, limits) as tuner:
        facts = {"device": tuner.name, "triton": tuner.spec.triton}
        outcomes = _load(out, facts)
        done = [outcome.problem for outcome in outcomes]
        left = [(name, problem) for name, problem in drawn if problem not in done]
        tuner.say(f"{len(left)} of {count} problems to measure on {tuner.name}")
        names = {problem: name for name, problem in left}
        for problem, trials in tuner.sweeps(list(names)):
            tuner.complain(problem, trials)
            failed = failed or any(trial.wrong for trial in trials)
            outcome = _outcome(names[problem], problem, trials, select(problem, tuner.spec, plan="heuristic"))
            if outcome is None:
                failed = True
                continue
            outcomes.append(outcome)
            if out is not None:
                with open(out, "a", encoding="utf-8") as file:
                    file.write(json.dumps({**facts, **outcome.to_json()}) + "\n")
        tuner.say("done")
    wanted = [problem for _, problem in drawn]
    print(report([outcome for outcome in outcomes if outcome.problem in wanted], count))
    return int(failed)


def _outcome(name: str, problem: Problem, trials: Sequence[Trial], heuristic: Plan) -> Optional[Outcome]:
    best = best_of(trials)
    if best is None or best.us is None:
        return None
    alone = next((trial.us for trial in trials if trial.plan == heuristic), None)
    plans = {str(trial.plan): trial.us for trial in trials}
    return Outcome(name, problem, trials[0].plan, trials[0].us, alone, best.plan, best.us, plans)


def _load(path: Optional[str], facts: Dict[str, str]) -> List[Outcome]:
    if path is None or not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.strip()]
    return [
        Outcome.from_json(line)
        for line in lines
        if line["device"] == facts["device"] and same_minor_version(line["triton"], facts["triton"])
    ]


def report(outcomes: Sequence[Outcome], drawn: int) -> str:
    """Shares by class, then the problems whose choice is furthest from the best."""
    from ..report import table

    lines = []
    for name in [*dict.fromkeys(outcome.name for outcome in outcomes), None]:
        some = [outcome for outcome in outcomes if name in (None, outcome.name)]
        cells = [name or "all", str(len(some))]
        for which in ("choice_us", "heuristic_us"):
            ratios = [getattr(o, which) / o.best_us if getattr(o, which) else math.inf for o in some]
            cells += [share(ratios), f"{median(ratios):.3f}" if ratios else "-", f"{max(ratios, default=0):.2f}"]
        lines.append(cells)
    within = f"within {100 * (TOLERANCE - 1):.0f} %"
    header = ["class", "problems", f"choice {within}", "median", "worst", f"heuristic {within}", "median", "worst"]
    slow = sorted(outcomes, key=lambda o: -(o.choice_us or math.inf) / o.best_us)
    far = [o for o in slow if (o.choice_us or math.inf) > TOLERANCE * o.best_us][:20]
    parts = [f"{len(outcomes)} of {drawn} problems, {sum(len(o.plans) for o in outcomes)} plans", table(header, lines)]
    if far:
        rows = [[describe(o.problem), _us(o.choice_us), str(o.choice), _us(o.best_us), str(o.best)] for o in far]
        parts.append(table(["slower than that", "us", "choice", "us", "best"], rows, left=5))
    return "\n\n".join(parts)


def share(ratios: Sequence[float]) -> str:
    """The share of ratios up to TOLERANCE."""
    return f"{100 * sum(r <= TOLERANCE for r in ratios) / len(ratios):.1f} %" if ratios else "-"


def _us(us: Optional[float]) -> str:
    return "does not run" if us is None else f"{us:.1f}"
