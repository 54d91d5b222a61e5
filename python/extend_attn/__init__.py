"""Extend attention over a KV pool with page size 1.

Importing this package imports neither torch nor triton and touches no GPU: each public name is fetched from its module
when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .attention import (
        build_unified_kv_indices,
        extend_attention_fwd,
        extend_attention_fwd_unified,
        redundant_attention,
    )
    from .checks import last_error
    from .ops.tp_qknorm import fused_parallel_qknorm
    from .plan import DeviceSpec, Plan, Tile
    from .problem import Problem
    from .selection import explain, select_plan
    from .warming import WarmupReport, warmup

# Where each public name lives.
_HOME = {
    "extend_attention_fwd": "attention",
    "extend_attention_fwd_unified": "attention",
    "build_unified_kv_indices": "attention",
    "redundant_attention": "attention",
    "warmup": "warming",
    "WarmupReport": "warming",
    "last_error": "checks",
    "fused_parallel_qknorm": "ops.tp_qknorm",
    "Problem": "problem",
    "Plan": "plan",
    "Tile": "plan",
    "DeviceSpec": "plan",
    "select_plan": "selection",
    "explain": "selection",
}
# Submodules that may be reached as attributes without an import of their own.
_SUBMODULES = frozenset({"bench", "comm", "plan", "problem", "reference"})

__all__ = [
    "DeviceSpec",
    "Plan",
    "Problem",
    "Tile",
    "WarmupReport",
    "__version__",
    "build_unified_kv_indices",
    "explain",
    "extend_attention_fwd",
    "extend_attention_fwd_unified",
    "fused_parallel_qknorm",
    "last_error",
    "redundant_attention",
    "select_plan",
    "warmup",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        value = getattr(import_module("." + _HOME[name], __name__), name)
    elif name in _SUBMODULES:
        value = import_module("." + name, __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME) | _SUBMODULES)
