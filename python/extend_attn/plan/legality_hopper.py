"""What the Gluon families for Hopper can run, and the shared memory that they take."""

from __future__ import annotations

from typing import Callable, Dict, Optional, Tuple

from ..problem import ELEMENT_SIZE, Problem
from .blocks import next_power_of_2
from .device import DeviceSpec
from .tile import Plan

GLUON_TRITON = (3, 6)  # the first whose Gluon has warp specialisation with registers for each partition
CAPABILITY = (9, 0)  # warpgroup products are this architecture's alone
ALIGNMENT = 16  # bytes of one asynchronous copy, and so of base pointers and strides
COLUMNS = 8  # elements of one asynchronous copy: head dims are multiples
SWIZZLE = 64  # 16-bit columns of the widest swizzle; narrower blocks are padded to it
BARRIERS = 1024  # bytes: mbarriers and what warp specialisation keeps in shared memory


def hopper_blocks(head_dim_qk: int, head_dim_v: int) -> Tuple[int, int, int]:
    """(BLOCK_D, BLOCK_PE, BLOCK_DV): the key's head dim as one block or as two where that wastes less, the value's.

    192 is 128 + 64, 576 is 512 + 64; 96 is padded to 128. Padding costs shared memory, not traffic.
    """
    whole = max(SWIZZLE, next_power_of_2(head_dim_qk))
    half = whole // 2
    rest = max(SWIZZLE, next_power_of_2(head_dim_qk - half))
    split = half >= SWIZZLE and half < head_dim_qk and half + rest < whole
    block_dv = max(SWIZZLE, next_power_of_2(head_dim_v))
    return (half, rest, block_dv) if split else (whole, 0, block_dv)


def hopper_illegal(problem: Problem, plan: Plan, device: DeviceSpec) -> Optional[str]:
    """Why a Hopper family's ``plan`` cannot run ``problem`` on ``device``, or None if it can."""
    return _no_gluon(problem, plan, device) or _ILLEGAL[plan.family](problem, plan, device)


def hopper_shared_memory(problem: Problem, plan: Plan) -> int:
    """Bytes of shared memory that a Hopper family's kernel takes."""
    return _SHARED_MEMORY[plan.family](problem, plan)


def _no_gluon(problem: Problem, plan: Plan, device: DeviceSpec) -> Optional[str]:
    """What holds for every Hopper family."""
    family = plan.family
    if device.capability != CAPABILITY:
        return f"{family}: written for sm_90, not {device.arch}"
    if device.interpreted:
        return f"{family}: Triton's interpreter does not run Gluon kernels"
    if not device.triton_at_least(*GLUON_TRITON):
        return f"{family}: needs Triton {GLUON_TRITON[0]}.{GLUON_TRITON[1]} or newer, not {device.triton}"
    if problem.dtype == "float32":
        return f"{family}: warpgroup products take 16-bit types; fp32 would be rounded to TF32"
    if problem.alignment < ALIGNMENT:
        return f"{family}: pointers and strides are aligned to {problem.alignment} bytes; {ALIGNMENT} are needed"
    if problem.head_dim_qk % COLUMNS or problem.head_dim_v % COLUMNS:
        return f"{family}: head dims {problem.head_dim_qk}/{problem.head_dim_v} are not multiples of {COLUMNS}"
    if plan.tma:
        return f"tma: a flag of the plain tiled family; {family} loads as it must"
    return None


def _packed_illegal(problem: Problem, plan: Plan, device: DeviceSpec) -> Optional[str]:
    return "hopper_packed: not in this version"


def _packed_shared_memory(problem: Problem, plan: Plan) -> int:
    block_d, block_pe, block_dv = hopper_blocks(problem.head_dim_qk, problem.head_dim_v)
    size = ELEMENT_SIZE[problem.dtype]
    rows = plan.tile.block_m * (block_d + block_pe + plan.tile.block_n)
    ring = plan.tile.num_stages * plan.tile.block_n * max(block_d + block_pe, block_dv)
    return (rows + ring) * size + BARRIERS


def _tiled_illegal(problem: Problem, plan: Plan, device: DeviceSpec) -> Optional[str]:
    return "hopper_tiled: not in this version"


def _tiled_shared_memory(problem: Problem, plan: Plan) -> int:
    block_d, block_pe, block_dv = hopper_blocks(problem.head_dim_qk, problem.head_dim_v)
    rows = plan.tile.block_m + plan.tile.num_stages * plan.tile.block_n
    return rows * max(block_d + block_pe, block_dv) * ELEMENT_SIZE[problem.dtype] + BARRIERS


_ILLEGAL: Dict[str, Callable[[Problem, Plan, DeviceSpec], Optional[str]]] = {
    "hopper_packed": _packed_illegal,
    "hopper_tiled": _tiled_illegal,
}
_SHARED_MEMORY: Dict[str, Callable[[Problem, Plan], int]] = {
    "hopper_packed": _packed_shared_memory,
    "hopper_tiled": _tiled_shared_memory,
}
