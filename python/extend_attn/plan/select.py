"""Which plan a problem gets.

The order: what the caller says, the user's own table, measured rows that ship with the package, the heuristic, SGLang's
rule. The first that is legal on the device is taken, and ``Plan.source`` says which it was.
"""

from __future__ import annotations

import os
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from ..problem import Problem
from . import tables
from .candidates import candidates, fitting
from .device import DeviceSpec
from .heuristics import heuristic, plain_family
from .legality import illegal
from .sglang_rule import VERIFY_MIN_BATCH, sglang_plan
from .tile import FAMILIES, Plan, Tile

PlanLike = Union[None, str, Plan, Mapping[str, Any]]
TileLike = Union[None, Tile, Mapping[str, Any], Sequence[int]]

SELECTORS = ("sglang", "sglang-legacy", "heuristic", "table:PATH")
_TABLE_PREFIX = "table:"

_CACHE_MAX = 4096  # keys hold buckets, so one process meets few; the limit only bounds a pathological one
_cache: Dict[Any, Plan] = {}
_forget_too: List[Callable[[], None]] = []


def select(
    problem: Problem,
    device: DeviceSpec,
    *,
    plan: PlanLike = None,
    tile: TileLike = None,
    table: Optional[str] = None,
) -> Plan:
    """The plan that ``problem`` runs with on ``device``; what a repeated call costs is one look into a dict.

    ``plan``: None for the default choice; a Plan; a dict of Plan fields, the missing ones from the default choice (of
    the family that the dict names; where the default is a Hopper family that they do not go with, from the plain
    family's); or a selector: "heuristic" (no tables), "sglang", "sglang-legacy", "table:PATH"
    (as ``table=PATH``). ``tile`` is short for ``plan={"tile": tile}`` and may accompany a selector. ``table`` is a
    file of measured rows that stands for the user's own; a problem that it does not cover goes on to the packaged ones.

    Raises ValueError (or TypeError) naming the argument: an unknown selector or field, a bad table file, and an
    explicit plan that cannot run, with the reason. What is chosen by default is always legal; NotImplementedError if
    nothing is.
    """
    key: Tuple[Any, ...] = (problem.key(), device, os.environ.get(tables.ENVIRONMENT))
    try:
        if plan is not None or tile is not None or table is not None:
            # SGLang's rule has a border inside a bucket of batch sizes
            border = plan in ("sglang", "sglang-legacy") and problem.batch_size >= VERIFY_MIN_BATCH
            key = (*key, frozen(plan), frozen(tile), table, border)
        found = _cache.get(key)
    except TypeError:  # hardly a plan, so this raises what is wrong
        return _choose(problem, device, plan, tile, table)
    if found is None:
        found = _choose(problem, device, plan, tile, table)
        if len(_cache) >= _CACHE_MAX:
            _cache.clear()
        _cache[key] = found
    return found


def forget() -> None:
    """Drops every remembered choice and table, so that changed table files count."""
    _cache.clear()
    tables.forget()
    for drop in _forget_too:
        drop()


def on_forget(drop: Callable[[], None]) -> None:
    """Has ``forget`` call ``drop`` too: for those who keep chosen plans."""
    _forget_too.append(drop)


def _choose(problem: Problem, device: DeviceSpec, plan: PlanLike, tile: TileLike, table: Optional[str]) -> Plan:
    changes: Dict[str, Any] = {}
    if isinstance(plan, Mapping):
        changes = dict(plan)
    elif isinstance(plan, Plan):
        changes = {"tile": plan.tile}
    if tile is not None:
        if "tile" in changes:
            raise ValueError(f"tile: got {tile!r} beside a plan that already names its tile; give one of them")
        changes["tile"] = tile

    bases, named = _bases(problem, device, plan, table, changes.get("family"))
    if not changes and not named:
        return bases[0]
    reason: Optional[str] = None
    for base in bases:
        chosen = base.merged({**changes, "source": "explicit"}) if changes else base
        reason = illegal(problem, chosen, device)
        if reason is None:
            return chosen
    raise ValueError(f"plan: {chosen} cannot run here: {reason}")


def _bases(
    problem: Problem, device: DeviceSpec, plan: PlanLike, table: Optional[str], family: Optional[str]
) -> Tuple[List[Plan], bool]:
    """(the plans that explicit fields may be laid over, the first that goes with them counts; whether the first was
    named and so must be legal as it is)."""
    sized = problem.bucketed()  # so that every problem of one key gets one plan
    if isinstance(plan, Plan):
        return [plan], True
    if isinstance(plan, str):
        if plan in ("sglang", "sglang-legacy"):
            return [sglang_plan(problem, device, legacy=plan == "sglang-legacy")], True
        if plan == "heuristic":
            return [fitting(sized, heuristic(sized, device), device)], True
        if not plan.startswith(_TABLE_PREFIX) or plan == _TABLE_PREFIX:
            raise ValueError(f"plan: got {plan!r}; selectors are {', '.join(SELECTORS)}")
        table = plan[len(_TABLE_PREFIX) :]
    elif plan is not None and not isinstance(plan, Mapping):
        raise TypeError(f"plan: got {plan!r}; expected a Plan, a dict of its fields, or a selector's name")
    default = default_plan(sized, device, table)
    if family == default.family or (family not in FAMILIES and not default.hopper):
        return [default], False
    if family in FAMILIES:
        return [fitting(sized, heuristic(sized, device, family), device)], False
    # fields that a Hopper family does not go with are meant for the plain one
    return [default, fitting(sized, heuristic(sized, device, plain_family(sized)), device)], False


def default_plan(problem: Problem, device: DeviceSpec, table: Optional[str] = None) -> Plan:
    """The first legal plan of the tables and the candidates."""
    for plan in (*measured(problem, device, table), *candidates(problem, device)):
        if illegal(problem, plan, device) is None:
            return plan
    raise NotImplementedError(
        f"plan: no tile fits head dims {problem.head_dim_qk}/{problem.head_dim_v} in {problem.dtype} on {device.name} "
        f"({device.arch}, {device.shared_memory} bytes of shared memory)"
    )


def measured(problem: Problem, device: DeviceSpec, table: Optional[str] = None) -> Iterator[Plan]:
    """Plans of measured rows, the user's own table before the packaged one, nearest row first; legal or not."""
    path = tables.user_table_path(table)
    for found in (tables.load(path) if path else None, tables.packaged_table(device)):
        if found is not None:
            yield from found.matches(problem, device)


_ALONE = frozenset({str, Plan, Tile, type(None)})  # immutable, and equal to nothing of another type
_NUMBERS = frozenset({bool, int, float})  # 1 == 1.0 == True, but not every one of them is a number of splits


def frozen(value: Any) -> Any:
    """What ``plan`` or ``tile`` says now, to be remembered by: hashable, and equal only for what is taken alike.

    TypeError for types that plans are not written in; what such a value says may change while it looks the same.
    """
    kind = type(value)
    if kind in _ALONE:
        return value
    if kind in _NUMBERS:
        return kind, value
    if kind is dict or isinstance(value, Mapping):
        return (dict, *[(frozen(name), frozen(item)) for name, item in value.items()])
    if isinstance(value, (list, tuple)):
        return (tuple, *map(frozen, value))
    raise TypeError(f"{kind.__name__}: no part of a plan")
