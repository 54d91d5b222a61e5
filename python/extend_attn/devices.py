"""The current GPU as the torch-free DeviceSpec that plans are made for."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from .plan.device import DeviceSpec, installed_triton

# What CPU tensors are planned for when the kernels run in Triton's interpreter.
INTERPRETED_AS = "sm_90"


def device_spec(device: torch.device) -> DeviceSpec:
    """The DeviceSpec of a torch device; of CPU tensors, the architecture that the interpreter stands in for."""
    if device.type == "cpu":
        return replace(DeviceSpec.preset(INTERPRETED_AS), interpreted=True)
    return _of_cuda(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _of_cuda(index: int) -> DeviceSpec:
    found = torch.cuda.get_device_properties(index)
    capability = "hip" if torch.version.hip else (found.major, found.minor)
    return DeviceSpec(
        name=found.name,
        capability=capability,
        sm_count=found.multi_processor_count,
        shared_memory=getattr(found, "shared_memory_per_block_optin", 64 * 1024),
        triton=installed_triton(),
    )
