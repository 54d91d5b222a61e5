"""What a sweep measures for a problem, in two rounds.

First the library's choice, each family's default and SGLang's rule; then what is one step away from those that were
nearly as fast. A family whose default is far behind is not stepped around: one step never brought that much.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Iterable, List, Optional, Sequence, Tuple

from ...plan.candidates import fitting, neighbours
from ...plan.device import DeviceSpec
from ...plan.heuristics import heuristic
from ...plan.legality import illegal
from ...plan.select import select
from ...plan.sglang_rule import sglang_plan
from ...plan.tile import FAMILIES, Plan
from ...problem import Problem

# Beyond this many new tokens a packed tile's rows no longer fit one program, and the keys are read again for each.
PACKED_TRIED_UP_TO = 64
SPLIT_STEPS = (2, 4)  # a plan's splits, divided and multiplied by these
FAR_BEHIND = 1.5  # times the fastest default


def defaults(problem: Problem, device: DeviceSpec) -> Tuple[List[Plan], List[Tuple[Plan, str]]]:
    """The first round: (plans that can run, the library's choice first; the others with the reason)."""
    legal, others = family_defaults(problem, device)
    legal = [select(problem, device), select(problem, device, plan="heuristic"), *legal]
    rule = sglang_plan(problem, device)
    if illegal(problem, rule, device) is None:
        legal.append(rule)
    return list(dict.fromkeys(legal)), others


def family_defaults(
    problem: Problem, device: DeviceSpec, families: Sequence[str] = FAMILIES
) -> Tuple[List[Plan], List[Tuple[Plan, str]]]:
    """(each family's default, made to fit; those that cannot run as they are, with the reason)."""
    legal: List[Plan] = []
    others: List[Tuple[Plan, str]] = []
    for family in families:
        if family.endswith("packed") and problem.max_len_extend > PACKED_TRIED_UP_TO:
            continue
        default = heuristic(problem, device, family)
        reason = illegal(problem, default, device)
        if reason is not None:
            others.append((default, reason))
            default = fitting(problem, default, device)
        if illegal(problem, default, device) is None:
            legal.append(replace(default, source="sweep"))
    return legal, others


def steps(problem: Problem, device: DeviceSpec, measured: Iterable[Tuple[Plan, Optional[float]]]) -> List[Plan]:
    """The second round: legal plans one step from the fastest of each family that is not far behind.

    measured: the first round's plans with their times in us, None for those that did not run.
    """
    timed = [(us, plan) for plan, us in measured if us is not None]
    known = {plan for plan, _ in measured}
    fastest = min((us for us, _ in timed), default=0.0)
    found: List[Plan] = []
    for family in FAMILIES:
        us, plan = min(((us, plan) for us, plan in timed if plan.family == family), default=(None, None), key=_time)
        if us is None or us > FAR_BEHIND * fastest:
            continue
        found += [*neighbours(plan), *_other_shares(plan, device)]
    legal = (plan for plan in dict.fromkeys(found) if plan not in known and illegal(problem, plan, device) is None)
    return [replace(plan, source="sweep") for plan in legal]


def _time(entry: Tuple[Optional[float], Optional[Plan]]) -> float:
    return entry[0] or 0.0


def _other_shares(plan: Plan, device: DeviceSpec) -> List[Plan]:
    """Fewer and more programs that share a sequence's keys; of hopper_packed also even shares of all sequences'."""
    if plan.family == "tiled":
        return []
    counts = {1, *(plan.split_kv * n for n in SPLIT_STEPS), *(max(1, plan.split_kv // n) for n in SPLIT_STEPS)}
    plans = [
        plan.merged({"split_kv": n, "programs": 0, "pdl": device.at_least(9) and (plan.hopper or n > 1)})
        for n in sorted(counts)
    ]
    if plan.family == "hopper_packed":
        plans.append(plan.merged({"split_kv": 1, "programs": device.sm_count, "pdl": True}))
    return plans
