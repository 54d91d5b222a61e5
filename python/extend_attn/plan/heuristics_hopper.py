"""What the Hopper families get by default, and where they are the default at all."""

from __future__ import annotations

from typing import Optional

from ..problem import Problem
from .device import DeviceSpec
from .tile import Plan, Tile


def preferred_hopper_plan(problem: Problem, device: DeviceSpec) -> Optional[Plan]:
    """The Hopper family's plan where one was measured to be faster than the plain families; None elsewhere."""
    return None


def hopper_packed_plan(problem: Problem, device: DeviceSpec) -> Plan:
    """Rows: new tokens times the heads of a group."""
    return Plan("hopper_packed", Tile(16, 64, 4, 3), source="heuristic")


def hopper_tiled_plan(problem: Problem, device: DeviceSpec) -> Plan:
    """Rows: tokens of one head."""
    return Plan("hopper_tiled", Tile(128, 64, 8, 4), source="heuristic")
