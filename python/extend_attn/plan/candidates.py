"""Plans worth trying for a problem, in order of preference; the list is also what a sweep times."""

from __future__ import annotations

from dataclasses import replace
from typing import Iterable, Iterator, List, Optional

from ..problem import Problem
from .device import DeviceSpec
from .heuristics import heuristic, plain_family
from .legality import illegal, shared_memory_bytes
from .legality_hopper_tiled import CONSUMERS, ROWS, WARPS
from .sglang_rule import sglang_plan
from .tile import BLOCK_M_MIN, BLOCK_MAX, BLOCK_MIN, GATHERS, STAGES_MAX, Plan, Tile

# Below this a K/V tile is too narrow to keep the tensor cores busy; rows are given up before keys are.
NARROW_BLOCK_N = 32
# What a family's tiles shrink to: a Hopper family's keys stay at what a warpgroup product takes, and hopper_tiled's
# rows at those of two consumers.
HOPPER_BLOCK_N = 64
SMALLEST_PLAIN = Tile(BLOCK_MIN, BLOCK_MIN, num_stages=1)
SMALLEST = {
    "hopper_tiled": Tile(2 * ROWS, HOPPER_BLOCK_N, 2 * WARPS, num_stages=1),
    "hopper_packed": Tile(BLOCK_MIN, HOPPER_BLOCK_N, num_stages=2),
}


def candidates(problem: Problem, device: DeviceSpec) -> List[Plan]:
    """Distinct plans: the heuristic's choice, its ever smaller versions, its neighbours, SGLang's rule and the old one.

    Plans that are illegal on ``device`` are in it (``illegal`` says why). The first legal one is the default where
    nothing was measured. Where a Hopper family is the choice, that of the plain families follows.
    """
    first = heuristic(problem, device)
    plain = heuristic(problem, device, plain_family(problem)) if first.hopper else first
    return _distinct(
        (
            *(p for plan in dict.fromkeys((first, plain)) for p in (plan, *shrinking(problem, plan, device))),
            *neighbours(first),
            sglang_plan(problem, device),
            sglang_plan(problem, device, legacy=True),
        )
    )


def sweep12() -> List[Plan]:
    """Twelve tiles around SGLang's published ones, for the tiled family with one head a tile.

    Four heights by three pipelines, 64 keys wide: the rule before tuning (128, 64, 8 warps, 1 stage), both tuned tiles
    (32, 64 and 16, 64 with 4 warps, 2 stages) and what lies between them.
    """
    return [
        Plan("tiled", Tile(block_m, 64, num_warps, num_stages), source="sweep")
        for block_m in (16, 32, 64, 128)
        for num_warps, num_stages in ((4, 1), (4, 2), (8, 1))
    ]


def fitting(problem: Problem, plan: Plan, device: DeviceSpec) -> Plan:
    """``plan``, or the first smaller version of it that is legal; ``plan`` itself if there is none."""
    for smaller in (plan, *shrinking(problem, plan, device)):
        if illegal(problem, smaller, device) is None:
            return smaller
    return plan


def step_down(problem: Problem, plan: Plan, device: DeviceSpec) -> Optional[Plan]:
    """The next plan after ``plan`` that is legal and needs less shared memory, or None if there is none.

    For what the estimate did not foresee: the compiler may need more than ``shared_memory_bytes`` says. Following it
    from any plan ends, since the estimate falls at every step, but for the one from the last of a Hopper family to the
    plain family's default.
    """
    before = shared_memory_bytes(problem, plan, device)
    for smaller in shrinking(problem, plan, device):
        if shared_memory_bytes(problem, smaller, device) < before and illegal(problem, smaller, device) is None:
            return smaller
    if not plan.hopper:
        return None
    plain = fitting(problem, heuristic(problem, device, plain_family(problem)), device)
    return plain if illegal(problem, plain, device) is None else None


def shrinking(problem: Problem, plan: Plan, device: DeviceSpec) -> Iterator[Plan]:
    """Ever smaller versions of ``plan``, legal or not, down to the smallest tile of its family.

    Fewer stages down to two, fewer keys down to NARROW_BLOCK_N, fewer rows (which also free registers), then the
    narrowest tile, and one stage last: without a pipeline nothing hides the loads.
    """
    smallest = SMALLEST.get(plan.family, SMALLEST_PLAIN)
    narrow = max(NARROW_BLOCK_N, smallest.block_n)
    while True:
        tile = plan.tile
        if tile.num_stages > 2:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif tile.block_n > narrow:
            tile = replace(tile, block_n=tile.block_n // 2)
        elif tile.block_m > smallest.block_m:
            warps = smallest.num_warps if plan.family == "hopper_tiled" else tile.num_warps
            tile = replace(tile, block_m=tile.block_m // 2, num_warps=warps)
        elif tile.block_n > smallest.block_n:
            tile = replace(tile, block_n=tile.block_n // 2)
        elif tile.num_stages > smallest.num_stages:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        else:
            return
        plan = replace(plan, tile=tile)
        yield plan


def neighbours(plan: Plan) -> Iterator[Plan]:
    """One step in each direction, for sweeps."""
    tile, smallest = plan.tile, SMALLEST.get(plan.family, SMALLEST_PLAIN)
    wider, narrower = tile.block_n * 2, tile.block_n // 2
    # hopper_packed's ring goes by twos: how many programs share a multiprocessor follows from it
    deeper, shallower = tile.num_stages + 1, tile.num_stages - 1
    if plan.family == "hopper_packed":
        deeper, shallower = min(2 * tile.num_stages, STAGES_MAX), max(tile.num_stages // 2, 2)
    steps = [
        {"num_stages": deeper},
        {"num_stages": shallower},
        {"block_n": wider, "num_stages": max(1, tile.num_stages - 1)},
        {"block_n": narrower, "num_stages": tile.num_stages + 1},
    ]
    if plan.family != "hopper_tiled":  # whose rows and warps are those of its consumers
        steps += [
            {"num_warps": 8 if tile.num_warps == 4 else 4},
            {"block_m": tile.block_m * 2, "num_warps": 8},
            {"block_m": tile.block_m // 2, "num_warps": 4},
        ]
    for changes in steps:
        sizes = {**tile.to_json(), **changes}
        rows = (BLOCK_M_MIN if plan.hopper else BLOCK_MIN) <= sizes["block_m"] <= BLOCK_MAX
        keys = smallest.block_n <= sizes["block_n"] <= BLOCK_MAX
        if rows and keys and 1 <= sizes["num_stages"] <= STAGES_MAX:
            yield replace(plan, tile=Tile(**sizes))
    if plan.family == "hopper_tiled":
        for n in CONSUMERS:  # four take rows of one head and the narrow tile of keys
            other = Tile(n * ROWS, HOPPER_BLOCK_N, n * WARPS, tile.num_stages)
            yield replace(plan, tile=other, pack_gqa=plan.pack_gqa and n == 2)
        yield from (replace(plan, gather=gather) for gather in GATHERS if gather != plan.gather)
    if not plan.packed:
        yield replace(plan, pack_gqa=not plan.pack_gqa)
        if not plan.hopper:
            yield replace(plan, tma=not plan.tma)
    else:
        yield replace(plan, split_kv=plan.split_kv * 2)
        if plan.split_kv > 1:
            yield replace(plan, split_kv=plan.split_kv // 2)


def _distinct(plans: Iterable[Plan]) -> List[Plan]:
    return list(dict.fromkeys(plans))  # plans are equal whoever chose them; the first of equals stays
