"""``select_plan`` and ``explain``: the plan package with the machine's own GPU filled in."""

from __future__ import annotations

from typing import Optional, Union

from .plan import DeviceSpec, Explanation, Plan
from .plan import explain as _explain
from .plan import select as _select
from .plan.select import PlanLike, TileLike
from .problem import Problem

DeviceLike = Union[None, str, DeviceSpec]


def select_plan(
    problem: Problem,
    device: DeviceLike = None,
    *,
    plan: PlanLike = None,
    tile: TileLike = None,
    table: Optional[str] = None,
) -> Plan:
    """The plan that a call with this problem runs with; ``source`` says who chose it.

    device: a preset ("h100", "sm_90", ...), a DeviceSpec, or None for the current GPU (the only case that imports
    torch). plan and tile overrule the choice as in ``extend_attention_fwd``; table is a file of measured rows to look
    in first. ValueError for an unknown device and for an explicit plan that cannot run, RuntimeError without a GPU.
    """
    return _select(problem, device_spec(device), plan=plan, tile=tile, table=table)


def explain(
    problem: Problem,
    device: DeviceLike = None,
    *,
    plan: PlanLike = None,
    tile: TileLike = None,
    table: Optional[str] = None,
) -> Explanation:
    """The candidates for this problem, the illegal ones with the reason, the choice and its source; print it.

    Arguments and errors as in ``select_plan``.
    """
    return _explain(problem, device_spec(device), plan=plan, tile=tile, table=table)


def device_spec(device: DeviceLike = None) -> DeviceSpec:
    """The DeviceSpec of a preset's name; of the current GPU for None (imports torch; RuntimeError if there is none)."""
    if isinstance(device, DeviceSpec):
        return device
    if isinstance(device, str):
        return DeviceSpec.preset(device)
    return _current_gpu()


def _current_gpu() -> DeviceSpec:
    try:
        import torch
    except ImportError:
        available = False
    else:
        available = torch.cuda.is_available()
    if not available:
        names = ", ".join(DeviceSpec.preset_names())
        raise RuntimeError(f"device: there is no GPU here; name the one to plan for: {names}")
    from . import devices

    return devices.device_spec(torch.device("cuda", torch.cuda.current_device()))
