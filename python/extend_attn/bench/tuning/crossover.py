"""From how many new tokens on which family is the faster: each family's default, on a grid of shapes."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ...plan.legality import illegal
from ...plan.tile import Plan
from ...problem import Problem
from .sweep import family_defaults
from .tune import Limits, Trial, Tuner

BURST_US = 4000.0  # measured time of one figure
TOKENS = (8, 12, 16, 24, 32, 48, 64)
HEAD_DIMS = (64, 128, 256, 512)
GROUPS = (1, 2, 4, 8)
BATCHES = (1, 16)
PREFIXES = (0, 2048, 8000)
KV_HEADS = 4
GROUP_WITHOUT_PREFIX = 2
FAMILIES = ("hopper_packed", "hopper_tiled", "tiled")
PAIRED = "hopper_tiled pairs"  # the two consumers of a program take two heads
COLUMNS = (*FAMILIES, PAIRED)
SHAPE = ("head_dim", "group", "batch", "prefix", "new")


def grid(seed: int = 0) -> List[Problem]:
    """The shapes in random order, so that a run that is cut short has seen some of each kind."""
    problems = [
        Problem(
            dtype="bfloat16", head_dim_qk=head_dim, head_dim_v=head_dim, num_q_heads=KV_HEADS * group,
            num_kv_heads=KV_HEADS, batch_size=batch, num_tokens=batch * new, max_len_extend=new,
            num_kv_indices=batch * prefix,
        )
        for new, head_dim, group, batch, prefix in itertools.product(TOKENS, HEAD_DIMS, GROUPS, BATCHES, PREFIXES)
        if prefix or group == GROUP_WITHOUT_PREFIX
    ]  # fmt: skip
    random.Random(seed).shuffle(problems)
    return problems


def crossover(device: str, limits: Limits, out: Optional[str] = None) -> int:
    """Measures the grid, prints each shape's times and writes them to ``out``. Returns 0; 1 if a result was wrong."""
    limits = replace(limits, burst_us=BURST_US if limits.burst_us is None else limits.burst_us)
    lines: List[Dict[str, Any]] = []
    failed = False
    with Tuner(device, limits) as tuner:
        plans = {problem: _plans(problem, tuner) for problem in grid()}
        for problem, trials in tuner.each(plans):
            tuner.complain(problem, trials)
            failed = failed or any(trial.wrong for trial in trials)
            lines.append(_line(problem, trials))
        facts = {"device": tuner.name, "triton": tuner.spec.triton, "kv_heads": KV_HEADS}
        tuner.say("done")
    lines.sort(key=lambda line: [line[name] for name in SHAPE])
    if out is not None:
        with open(out, "w", encoding="utf-8") as file:
            file.write(json.dumps(facts)[:-1] + ', "us": [\n')
            file.write(",\n".join(json.dumps(line) for line in lines) + "\n]}\n")
    print(report(lines))
    return int(failed)


def _plans(problem: Problem, tuner: Tuner) -> List[Plan]:
    plans = family_defaults(problem, tuner.spec, FAMILIES)[0]
    paired = [plan.merged({"pack_gqa": not plan.pack_gqa}) for plan in plans if plan.family == "hopper_tiled"]
    return [*plans, *(plan for plan in paired if illegal(problem, plan, tuner.spec) is None)]


def shape_of(problem: Problem) -> Tuple[int, ...]:
    """A problem of the grid, as SHAPE names its numbers."""
    p = problem
    return p.head_dim_qk, p.group, p.batch_size, p.num_kv_indices // p.batch_size, p.max_len_extend


def column(plan: Plan) -> str:
    """What a plan's time is called in the results."""
    return PAIRED if plan.family == "hopper_tiled" and plan.pack_gqa else plan.family


def _line(problem: Problem, trials: Sequence[Trial]) -> Dict[str, Any]:
    line: Dict[str, Any] = dict(zip(SHAPE, shape_of(problem)))
    line.update({column(trial.plan): trial.us and round(trial.us, 2) for trial in trials})
    return line


def report(lines: Sequence[Dict[str, Any]]) -> str:
    """A line for each shape: the fastest family for each number of new tokens, and what the next one takes more."""
    from ..report import table

    names = SHAPE[:-1]
    shapes = list(dict.fromkeys(tuple(line[name] for name in names) for line in lines))
    rows = []
    for shape in shapes:
        of = {line["new"]: line for line in lines if tuple(line[name] for name in names) == shape}
        rows.append([*map(str, shape), *(_winner(of.get(new)) for new in TOKENS)])
    return table([*names, *(f"{new} new" for new in TOKENS)], rows, left=len(names))


def _winner(line: Optional[Dict[str, Any]]) -> str:
    timed = sorted((line[family], family) for family in COLUMNS if line.get(family)) if line else []
    if not timed:
        return "-"
    second = f" {timed[1][0] / timed[0][0]:.2f}" if len(timed) > 1 else ""
    return f"{timed[0][1].replace('hopper_', 'h-')} {timed[0][0]:.1f}{second}"
