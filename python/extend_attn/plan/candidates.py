"""Plans worth trying for a problem, in order of preference; the list is also what a sweep times."""

from __future__ import annotations

from dataclasses import replace
from typing import Iterator, List, Optional

from ..problem import Problem
from .device import DeviceSpec
from .heuristics import heuristic
from .legality import illegal, shared_memory_bytes
from .tile import BLOCK_MAX, BLOCK_MIN, Plan, Tile


def candidates(problem: Problem, device: DeviceSpec) -> List[Plan]:
    """Distinct plans, the heuristic's choice first, then its neighbours, then its ever smaller versions.

    Plans that are illegal on ``device`` are in it (``illegal`` says why); at least one is legal.
    """
    first = heuristic(problem, device)
    found: List[Plan] = []
    for plan in (first, *_neighbours(first)):
        if plan not in found:
            found.append(plan)
    plan = shrink(problem, first, device)
    while plan is not None:
        if plan not in found:
            found.append(plan)
        plan = shrink(problem, plan, device)
    return found


def _neighbours(plan: Plan) -> Iterator[Plan]:
    tile = plan.tile
    for changes in (
        {"num_stages": tile.num_stages + 1},
        {"num_stages": tile.num_stages - 1},
        {"num_warps": tile.num_warps * 2},
        {"block_n": tile.block_n * 2},
        {"block_n": tile.block_n // 2},
        {"block_n": tile.block_n // 2, "num_stages": tile.num_stages + 1},
        {"block_m": tile.block_m * 2},
        {"block_m": tile.block_m * 2, "num_warps": tile.num_warps * 2},
    ):
        values = {**tile.to_json(), **changes}
        blocks = values["block_m"], values["block_n"]
        if values["num_stages"] >= 1 and BLOCK_MIN <= min(blocks) and max(blocks) <= BLOCK_MAX:
            yield replace(plan, tile=Tile(**values))


def shrink(problem: Problem, plan: Plan, device: DeviceSpec) -> Optional[Plan]:
    """The next smaller plan, legal or not, or None at the end.

    Fewer stages down to two, then fewer keys, then fewer rows down to the smallest blocks, then one stage. Every step
    needs less shared memory.
    """
    tile = plan.tile
    if tile.num_stages > 2:
        smaller = replace(tile, num_stages=tile.num_stages - 1)
    elif tile.block_n > BLOCK_MIN:
        smaller = replace(tile, block_n=tile.block_n // 2)
    elif tile.block_m > BLOCK_MIN:
        smaller = replace(tile, block_m=tile.block_m // 2)
    elif tile.num_stages > 1:
        smaller = replace(tile, num_stages=1)
    else:
        return None
    return replace(plan, tile=smaller)


def step_down(problem: Problem, plan: Plan, device: DeviceSpec) -> Optional[Plan]:
    """The next plan after ``plan`` that is legal and needs less shared memory, or None if there is none.

    For what the estimate did not foresee: the compiler may need more than ``shared_memory_bytes`` says.
    """
    before = shared_memory_bytes(problem, plan, device)
    smaller = shrink(problem, plan, device)
    while smaller is not None:
        if shared_memory_bytes(problem, smaller, device) < before and illegal(problem, smaller, device) is None:
            return smaller
        smaller = shrink(problem, smaller, device)
    return None
