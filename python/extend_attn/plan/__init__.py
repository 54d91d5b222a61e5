"""Choosing how a problem is run. Nothing here imports torch or triton or needs a GPU."""

from __future__ import annotations

from .candidates import candidates, step_down
from .device import DeviceSpec
from .legality import illegal, shared_memory_bytes
from .select import select
from .tile import Plan, Tile

__all__ = ["DeviceSpec", "Plan", "Tile", "candidates", "illegal", "select", "shared_memory_bytes", "step_down"]
