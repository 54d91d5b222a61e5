"""Choosing how a problem is run. Nothing here imports torch or triton, and nothing needs a GPU.

Three questions, three answers: what *can* run (legality.py), what is the default (heuristics.py, sglang_rule.py), what
was *measured* (tables.py, tables/). select.py puts them in order; explain.py shows its work.
"""

from __future__ import annotations

from .candidates import candidates, step_down, sweep12
from .device import DeviceSpec
from .explain import Explanation, explain
from .legality import illegal, shared_memory_bytes
from .select import select
from .sglang_rule import sglang_rule
from .tile import Plan, Tile

__all__ = [
    "DeviceSpec",
    "Explanation",
    "Plan",
    "Tile",
    "candidates",
    "explain",
    "illegal",
    "select",
    "sglang_rule",
    "shared_memory_bytes",
    "step_down",
    "sweep12",
]
