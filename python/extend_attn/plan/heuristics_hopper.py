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
    """128 keys a tile where the registers hold their logits beside the accumulator; two heads a program if they pair."""
    block_n = 128 if problem.head_dim_qk <= 192 and problem.head_dim_v <= 128 else 64
    num_stages = 2 if problem.head_dim_qk <= 256 else 1
    return Plan("hopper_tiled", Tile(128, block_n, 8, num_stages), pack_gqa=problem.group % 2 == 0, source="heuristic")
