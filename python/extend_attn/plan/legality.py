"""What *can* run: shared memory, registers, architecture. What is preferred is decided elsewhere."""

from __future__ import annotations

from typing import Optional

from ..problem import ELEMENT_SIZE, Problem
from .blocks import block_head_dim, block_head_dim_v
from .device import DeviceSpec
from .legality_hopper import hopper_illegal, hopper_shared_memory
from .tile import BLOCK_MIN, Plan, Tile

# 32-bit registers a thread can address (every architecture so far).
REGISTERS_PER_THREAD = 255
MAX_THREADS = 1024
SCRATCH = 1152  # bytes: reductions across warps, barriers
ROWS_OF_WEIGHTS_IN_REGISTERS = 128  # from this height on P stays with its warp
TMA_ALIGNMENT = 16  # bytes: base pointer and strides of a TMA descriptor
TMA_TRITON = (3, 4)  # the first with descriptors made on the host


def shared_memory_bytes(problem: Problem, plan: Plan, device: DeviceSpec) -> int:
    """Estimate of the shared memory of one block, in bytes; fitted to what Triton 3.7 allocates for sm_80 to sm_120.

    - The query tile.
    - Buffers of K and V: one a pipeline stage where the tensor cores read operands from shared memory, one less where a
      tile passes through registers first, because they are read there or to be converted from fp8; then the converted
      tile too. The pool's keys and the new ones use the same buffers in turn, so the larger counts. A V that is a part
      of its K takes none.
    - The weights P where operands come from registers.
    - Prefetched mask bytes and positions; on data-centre Blackwell a tile of fp32 logits on its way to the mask.
    """
    if plan.hopper:
        return hopper_shared_memory(problem, plan)
    tile = plan.tile
    size = ELEMENT_SIZE[problem.dtype]
    shared_operands = _reads_shared(problem, plan, device)
    buffers = [0]
    if problem.has_prefix:
        buffers.append(_key_bytes(problem, tile, shared_operands, problem.kv_dtype, problem.v_aliases_k_pool))
    if not problem.unified:
        buffers.append(_key_bytes(problem, tile, shared_operands, problem.dtype, problem.v_aliases_k_new))
    keys = max(buffers)
    if tile.num_stages == 2 and problem.kv_dtype != problem.dtype and not shared_operands:
        keys = sum(buffers)  # seen with fp8: the allocator finds no room for the small tiles among the large ones
    query = tile.block_m * sum(block_head_dim(problem.head_dim_qk)) * size
    if tile.block_m == tile.block_n == BLOCK_MIN and tile.num_stages == 1:
        return query + keys  # nothing smaller to step down to: given the benefit of the doubt
    elements = tile.block_m * tile.block_n
    plain = problem.kv_dtype == problem.dtype and not problem.custom_mask  # else even a tall tile's weights move
    in_registers = tile.block_m >= ROWS_OF_WEIGHTS_IN_REGISTERS and plain
    weights = 0 if shared_operands or in_registers else elements * size
    masks = (tile.num_stages - 1) * 4 * tile.block_n * problem.q_positions
    if problem.custom_mask and not shared_operands:
        masks += (tile.num_stages - 1) * elements
    elif problem.custom_mask and device.at_least(10):
        masks = 4 * elements
    return query + keys + weights + masks + SCRATCH


def _key_bytes(problem: Problem, tile: Tile, shared_operands: bool, dtype: str, v_is_k: bool) -> int:
    """Bytes of the K and V buffers of one source of keys (the pool or the new tokens)."""
    size = ELEMENT_SIZE[problem.dtype]
    block_d, block_pe = block_head_dim(problem.head_dim_qk)
    block_dv = 0 if v_is_k else block_head_dim_v(problem.head_dim_v, problem.head_dim_qk)
    one_product = tile.block_n * max(block_d, block_dv) * size
    if tile.num_stages == 1:  # nothing is prefetched: K is gone when V comes
        return one_product
    converted = dtype != problem.dtype
    stages = tile.num_stages if shared_operands and not converted else tile.num_stages - 1
    buffers = stages * tile.block_n * (block_d + block_pe + block_dv) * ELEMENT_SIZE[dtype]
    return buffers + one_product if shared_operands and converted else buffers


def _reads_shared(problem: Problem, plan: Plan, device: DeviceSpec) -> bool:
    """Whether products run on warp-group tensor cores (Hopper, data-centre Blackwell), which take K and V from shared
    memory: 16-bit types and at least 64 rows."""
    major = 0 if isinstance(device.capability, str) else device.capability[0]
    warp_group = major in (9, 10, 11)
    return warp_group and plan.tile.block_m >= 64 and plan.tile.num_warps >= 4 and problem.dtype != "float32"


def accumulator_registers(problem: Problem, plan: Plan, device: DeviceSpec) -> int:
    """Registers of one thread that hold the output accumulator and one tile of logits, both fp32."""
    tile = plan.tile
    elements = tile.block_m * (block_head_dim_v(problem.head_dim_v, problem.head_dim_qk) + tile.block_n)
    return elements // (tile.num_warps * device.warp_size)


def illegal(problem: Problem, plan: Plan, device: DeviceSpec) -> Optional[str]:
    """Why ``plan`` cannot run ``problem`` on ``device``, or None if it can."""
    tile = plan.tile
    if plan.hopper:
        return hopper_illegal(problem, plan, device)
    if plan.programs:
        return f"programs: {plan.programs}; only hopper_packed shares all sequences' keys evenly"
    if plan.gather:
        return "gather: only hopper_tiled reads prefixes that were gathered"
    if tile.block_m < BLOCK_MIN:
        return f"block_m: {tile.block_m}; the plain Triton families take {BLOCK_MIN} rows and more"
    if plan.packed:
        if plan.pack_gqa:
            return "pack_gqa: a flag of the tiled family; the packed family always packs"
        if plan.tma:
            return "tma: only the tiled family loads through TMA descriptors"
    elif plan.split_kv > 1:
        return f"split_kv: {plan.split_kv}; only the packed family splits a sequence's keys"
    if plan.tma:
        reason = no_tma(problem, device)
        if reason:
            return "tma: " + reason
    if plan.pdl and not device.at_least(9):
        return f"pdl: programmatic dependent launch needs sm_90 or newer, not {device.arch}"
    threads = tile.num_warps * device.warp_size
    if threads > MAX_THREADS:
        return f"num_warps: {tile.num_warps} x {device.warp_size} threads; a block has at most {MAX_THREADS}"
    registers = accumulator_registers(problem, plan, device)
    available = min(REGISTERS_PER_THREAD, device.registers // threads)
    if registers > available:
        return f"registers: {registers} a thread for accumulator and logits alone; there are {available}"
    needed = shared_memory_bytes(problem, plan, device)
    if needed > device.shared_memory:
        return f"shared memory: about {needed} bytes; a block on {device.arch} has {device.shared_memory}"
    return None


def no_tma(problem: Problem, device: DeviceSpec) -> Optional[str]:
    """Why the new K/V cannot be loaded through TMA descriptors, or None if they can."""
    if not device.at_least(9):
        return f"needs sm_90 or newer, not {device.arch}"
    if not device.triton_at_least(*TMA_TRITON):
        return f"needs Triton {TMA_TRITON[0]}.{TMA_TRITON[1]} or newer, not {device.triton}"
    if problem.unified:
        return "a unified call has no contiguous new K/V; its keys are all gathered"
    size = ELEMENT_SIZE[problem.dtype]
    if problem.alignment < TMA_ALIGNMENT:
        return f"base pointers and strides are aligned to {problem.alignment} bytes; {TMA_ALIGNMENT} are needed"
    if problem.head_dim_qk * size % TMA_ALIGNMENT or problem.head_dim_v * size % TMA_ALIGNMENT:
        return f"a head of K and of V must take a multiple of {TMA_ALIGNMENT} bytes"
    return None
