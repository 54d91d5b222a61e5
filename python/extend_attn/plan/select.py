"""Which plan a problem gets. The order: what the caller says, the user's table, measured rows, the heuristic."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Mapping, Optional, Sequence, Union

from ..problem import Problem
from .candidates import candidates
from .device import DeviceSpec
from .legality import illegal
from .tile import Plan, Tile


def select(
    problem: Problem,
    device: DeviceSpec,
    *,
    plan: Union[None, str, Plan, Mapping[str, Any]] = None,
    tile: Union[None, Tile, Mapping[str, Any], Sequence[int]] = None,
    table: Optional[str] = None,
) -> Plan:
    """The plan for ``problem`` on ``device``."""
    default = _default(problem.key(), problem.bucketed(), device)
    if plan is None and tile is None:
        return default
    if isinstance(plan, Plan):
        chosen = plan
    else:
        changes = dict(plan) if isinstance(plan, Mapping) else {}
        if tile is not None:
            changes["tile"] = tile
        chosen = default.merged({**changes, "source": "explicit"})
    reason = illegal(problem, chosen, device)
    if reason:
        raise ValueError(f"plan: {reason}")
    return chosen


@lru_cache(maxsize=4096)
def _default(key: Any, problem: Problem, device: DeviceSpec) -> Plan:
    return next(plan for plan in candidates(problem, device) if illegal(problem, plan, device) is None)
