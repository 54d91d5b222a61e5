"""What a sweep measures for a problem: the library's choice, each family's default, and one step in each direction."""

from __future__ import annotations

from typing import Dict, List, Optional, Tuple

from ...plan.candidates import candidates, fitting, neighbours, shrinking
from ...plan.device import DeviceSpec
from ...plan.heuristics import heuristic
from ...plan.legality import illegal
from ...plan.select import select
from ...plan.tile import FAMILIES, Plan
from ...problem import Problem

# Beyond this many new tokens a packed tile's rows no longer fit one program, and the keys are read again for each.
PACKED_TRIED_UP_TO = 64
SPLIT_STEPS = (2, 4)  # a packed plan's splits, divided and multiplied by these


def swept(problem: Problem, device: DeviceSpec) -> Tuple[List[Plan], List[Tuple[Plan, str]]]:
    """(plans that can run, the library's choice first; the others with the reason)."""
    found: Dict[Plan, Optional[str]] = {}

    def add(plan: Plan) -> None:
        if plan not in found:
            found[plan] = illegal(problem, plan, device)

    add(select(problem, device))
    smaller = set(shrinking(problem, heuristic(problem, device), device))  # for plans that do not fit, not for speed
    for plan in candidates(problem, device):
        if plan not in smaller:
            add(plan)
    for family in FAMILIES:
        if family.endswith("packed") and problem.max_len_extend > PACKED_TRIED_UP_TO:
            continue
        default = heuristic(problem, device, family)
        if illegal(problem, default, device) is not None:
            add(default)  # the reason is worth showing
            default = fitting(problem, default, device)
        add(default)
        for plan in neighbours(default):
            add(plan)
        if default.packed:
            for split_kv in sorted({1, *(default.split_kv * n for n in SPLIT_STEPS),
                                    *(max(1, default.split_kv // n) for n in SPLIT_STEPS)}):  # fmt: skip
                add(default.merged({"split_kv": split_kv}))
    legal = [plan for plan, reason in found.items() if reason is None]
    return legal, [(plan, reason) for plan, reason in found.items() if reason is not None]
