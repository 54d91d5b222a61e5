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


ROWS = 64  # of a consumer of the tiled family; a program has two


def tiled_blocks(problem: Problem) -> Tuple[int, int, int, int]:
    """(columns of a slot of keys, such slots a key, columns of a slot of values, such slots a value): the tiled family's.

    Narrower heads are padded with zeros on their way into shared memory. (0, 0, 0, 0) where there is no kernel.
    """
    dim, dim_v = problem.head_dim_qk, problem.head_dim_v
    keys = next((found for most, found in TILED_KEYS if dim <= most), None)
    values = next((found for most, found in TILED_VALUES if dim_v <= most), None)
    if keys is None or values is None:
        return 0, 0, 0, 0
    return (*keys, *values)


TILED_KEYS = ((64, (64, 1)), (128, (128, 1)), (192, (64, 3)), (256, (256, 1)), (512, (128, 4)))
TILED_VALUES = ((64, (64, 1)), (128, (128, 1)), (256, (256, 1)), (512, (256, 2)))
TILED_WARPS = 8  # two consumers of a warpgroup each
RING_MAX_LEN = (1 << 30) - 1  # rows that a ragged descriptor can address


def _tiled_illegal(problem: Problem, plan: Plan, device: DeviceSpec) -> Optional[str]:
    tile = plan.tile
    if (tile.block_m, tile.num_warps) != (2 * ROWS, TILED_WARPS):
        return f"tile: {tile}; a program has two consumers of {ROWS} rows and 4 warps: block_m 128, num_warps 8"
    if tile.block_n < ROWS or tile.block_n > 128:
        return f"block_n: {tile.block_n}; allowed are 64 and 128"
    if plan.split_kv > 1 and problem.sliding_window > 0:
        return f"split_kv: {plan.split_kv}; under a window a row may see no key of a split"
    if plan.pack_gqa and problem.group % 2:
        return f"pack_gqa: two heads share their keys, and {problem.group} heads a KV head are odd"
    columns, chunks, block_dv, slices = tiled_blocks(problem)
    if columns == 0:
        return f"head dims {problem.head_dim_qk}/{problem.head_dim_v}: keys and values of up to 512 columns have a kernel"
    registers = tile.block_n * 3 // 4 + block_dv // 2  # logits, weights in 16 bit, accumulator
    if registers > TILED_REGISTERS:
        return f"registers: {registers} a thread for logits, weights and accumulator; {TILED_REGISTERS} leave room"
    for asked, reason in (
        (problem.unified, "a unified call has no contiguous new K/V, which come through TMA"),
        (problem.custom_mask, "custom_mask: a value that no row sees can't be kept from the tensor cores"),
        (problem.kv_dtype != problem.dtype, f"a {problem.kv_dtype} pool is not copied as it is"),
        (problem.q_positions and problem.sliding_window > 0, "q_positions: the window is taken in rows"),
        (problem.num_tokens > RING_MAX_LEN, f"num_tokens: a descriptor addresses {RING_MAX_LEN} rows"),
    ):
        if asked:
            return f"hopper_tiled: {reason}"
    needed = _tiled_shared_memory(problem, plan)
    if needed > device.shared_memory:
        return f"shared memory: {needed} bytes; a block on {device.arch} has {device.shared_memory}"
    return None


TILED_REGISTERS = 176  # of 240: 64 keys at 256 columns; 128 there spill


def _tiled_shared_memory(problem: Problem, plan: Plan) -> int:
    columns, chunks, block_dv, slices = tiled_blocks(problem)
    keys = columns * chunks
    rows = 2 * ROWS * keys + plan.tile.num_stages * plan.tile.block_n * (keys + block_dv)
    # the output changes its layout on its way out; where value columns are sliced it does so in the query's place
    return rows * ELEMENT_SIZE[problem.dtype] + BARRIERS + (4096 if slices == 1 else 0)


_ILLEGAL: Dict[str, Callable[[Problem, Plan, DeviceSpec], Optional[str]]] = {
    "hopper_packed": _packed_illegal,
    "hopper_tiled": _tiled_illegal,
}
_SHARED_MEMORY: Dict[str, Callable[[Problem, Plan], int]] = {
    "hopper_packed": _packed_shared_memory,
    "hopper_tiled": _tiled_shared_memory,
}
