"""What the Gluon families for Hopper can run, and the shared memory that they take."""

from __future__ import annotations

from typing import Callable, Dict, Optional, Tuple

from ..problem import ELEMENT_SIZE, Problem
from .blocks import next_power_of_2
from .device import DeviceSpec
from .legality_hopper_tiled import SHARED_MEMORY, tiled_illegal, tiled_shared_memory, v_is_k
from .tile import Plan, Tile

GLUON_TRITON = (3, 6)  # the first whose Gluon has warp specialisation with registers for each partition
CAPABILITY = (9, 0)  # warpgroup products are this architecture's alone
ALIGNMENT = 16  # bytes of one asynchronous copy, and so of base pointers and strides
COLUMNS = 8  # elements of one asynchronous copy: head dims are multiples
SWIZZLE = 64  # 16-bit columns of the widest swizzle; narrower blocks are padded to it
PACKED_ROWS_MAX = 64
# Registers of accumulator, logits, weights and sums that leave a consumer enough for the rest: of 160 with room for two
# programs a multiprocessor, of 200 to 240, and of 160 where four warpgroups share the registers.
HELD_OF_TWO, HELD_MAX, HELD_MAX_CROWDED = 80, 176, 112
NARROW_PRODUCER = 64  # keys a tile up to which a producer needs no more than 72 registers
CODE_TILES = 2  # of fp8 codes, keys and values each: one is converted while the other is on its way
BARRIERS = 2560  # bytes: mbarriers, what warp specialisation keeps in shared memory, sums across warps


def packed_blocks(problem: Problem) -> Tuple[int, int]:
    """(BLOCK_D, BLOCK_PE): columns of a slot of the ring, which holds K or V, and of the rest of K beside it.

    192/128 is 128 and 64, 576/512 is 512 and 64; otherwise one block holds either. Padding costs shared memory, not
    traffic.
    """
    block_dv = max(SWIZZLE, next_power_of_2(problem.head_dim_v))
    whole = max(SWIZZLE, next_power_of_2(problem.head_dim_qk))
    rest = max(SWIZZLE, next_power_of_2(problem.head_dim_qk - whole // 2))
    if SWIZZLE <= whole // 2 < problem.head_dim_qk and rest < whole // 2 and block_dv <= whole // 2:
        return whole // 2, rest
    return max(whole, block_dv), 0


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


def is_fp8(problem: Problem) -> bool:
    """Whether pool rows are converted on their way."""
    return problem.has_pool and problem.kv_dtype != problem.dtype


def packed_registers(problem: Problem, plan: Plan) -> Tuple[int, int, int]:
    """(registers a thread that the launch reserves, those of a second consumer, those that a producer keeps); the first
    consumer has the rest.

    One consumer, a warpgroup, and one of producers get 160 and 96, which leaves room for two programs a multiprocessor.
    Many rows, or a group of converting producers for each of K and V, take what one program can have.
    """
    tall = plan.tile.num_warps > 4
    if not is_fp8(problem):
        if tall:
            return (168, 216, 72) if plan.tile.block_n <= NARROW_PRODUCER else (168, 200, 96)
        return (168, 0, 96) if packed_held(problem, plan.tile) > HELD_OF_TWO else (128, 0, 96)
    if tall:
        return (168, 200, 96) if v_is_k(problem) else (128, 160, 96)
    return 168, 0, 128


def packed_held_max(problem: Problem, tile: Tile) -> int:
    """The most that ``packed_held`` may be: two warpgroups of consumers and two of converting producers leave least."""
    return HELD_MAX_CROWDED if tile.num_warps > 4 and is_fp8(problem) and not v_is_k(problem) else HELD_MAX


def packed_held(problem: Problem, tile: Tile) -> int:
    """Registers of a consumer's thread that hold accumulator, logits, weights and sums."""
    return tile.block_m * (packed_blocks(problem)[0] + 3 * tile.block_n) // (tile.num_warps * 32)


def _packed_illegal(problem: Problem, plan: Plan, device: DeviceSpec) -> Optional[str]:
    tile = plan.tile
    if plan.pack_gqa:
        return "pack_gqa: a flag of the tiled families; the packed ones always pack"
    if plan.gather:
        return "gather: the packed families read each key once, or few times"
    if plan.programs and plan.split_kv > 1:
        return f"programs: {plan.programs} beside split_kv {plan.split_kv}; keys are shared in one way or the other"
    if plan.programs and problem.sliding_window > 0:
        return f"programs: {plan.programs}; a window makes lengths alike, and even shares count whole lists"
    if tile.num_warps not in (4, 8):
        return f"num_warps: {tile.num_warps}; the consumers are one or two warpgroups, 4 or 8"
    if tile.block_n not in (64, 128):
        return f"block_n: {tile.block_n}; a warpgroup product is 64 keys high, so 64 or 128"
    if tile.block_m < 2 * tile.num_warps or tile.block_m > PACKED_ROWS_MAX:
        return f"block_m: {tile.block_m}; with {tile.num_warps} warps {2 * tile.num_warps} to {PACKED_ROWS_MAX}"
    if tile.num_stages < 2:
        return "num_stages: 1; K and V take a slot of the ring each"
    held, most = packed_held(problem, tile), packed_held_max(problem, tile)
    if held > most:
        return f"registers: {held} a thread for accumulator, logits and sums; there are {most} to hold them"
    needed = _packed_shared_memory(problem, plan)
    if needed > device.shared_memory:
        return f"shared memory: about {needed} bytes; a block on {device.arch} has {device.shared_memory}"
    return None


def code_tiles(problem: Problem, plan: Plan) -> int:
    """Places for tiles of fp8 codes, as many of keys as of values: CODE_TILES, or 0 where the ring leaves no room."""
    fits = _ring_and_query(problem, plan) + _codes(problem, plan) <= SHARED_MEMORY
    return CODE_TILES if is_fp8(problem) and fits else 0


def _packed_shared_memory(problem: Problem, plan: Plan) -> int:
    return _ring_and_query(problem, plan) + (_codes(problem, plan) if code_tiles(problem, plan) else 0)


def _codes(problem: Problem, plan: Plan) -> int:
    """Bytes of all places for codes; the rest of K beside BLOCK_D is padded to as much."""
    block_d, block_pe = packed_blocks(problem)
    columns = block_d * (2 if block_pe else 1) * (1 if v_is_k(problem) else 2)
    return CODE_TILES * plan.tile.block_n * columns


def _ring_and_query(problem: Problem, plan: Plan) -> int:
    tile = plan.tile
    block_d, block_pe = packed_blocks(problem)
    pe_stages = tile.num_stages if v_is_k(problem) else (tile.num_stages + 1) // 2
    query = tile.block_m * (block_d + block_pe + tile.block_n)
    ring = tile.block_n * (tile.num_stages * block_d + pe_stages * block_pe)
    return (query + ring) * ELEMENT_SIZE[problem.dtype] + BARRIERS


_ILLEGAL: Dict[str, Callable[[Problem, Plan, DeviceSpec], Optional[str]]] = {
    "hopper_packed": _packed_illegal,
    "hopper_tiled": tiled_illegal,
}
_SHARED_MEMORY: Dict[str, Callable[[Problem, Plan], int]] = {
    "hopper_packed": _packed_shared_memory,
    "hopper_tiled": tiled_shared_memory,
}
