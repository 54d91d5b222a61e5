"""What *can* run: shared memory, registers, architecture. What is preferred is decided elsewhere."""

from __future__ import annotations

from typing import Optional

from ..problem import ELEMENT_SIZE, Problem
from .blocks import block_head_dim, block_head_dim_v
from .device import DeviceSpec
from .tile import BLOCK_MIN, Plan

# 32-bit registers a thread can address (every architecture so far).
REGISTERS_PER_THREAD = 255
MAX_THREADS = 1024
SCRATCH = 1024  # bytes: reductions across warps, barriers
TMA_ALIGNMENT = 16  # bytes: base pointer and strides of a TMA descriptor


def shared_memory_bytes(problem: Problem, plan: Plan, device: DeviceSpec) -> int:
    """Estimate of the shared memory of one block, in bytes; fitted to what Triton 3.7 allocates for sm_80 to sm_120.

    - The query tile.
    - Buffers of K and V: one a pipeline stage where the tensor cores read operands from shared memory, one less where a
      tile passes through registers first, because they are read there or to be converted from fp8. The pool's keys and
      the new ones use the same buffers in turn, so the larger counts. A V that is a part of its K takes none.
    - The converted tile (fp8), or the weights P where operands come from registers.
    """
    tile = plan.tile
    size = ELEMENT_SIZE[problem.dtype]
    block_d, block_pe = block_head_dim(problem.head_dim_qk)
    shared_operands = _reads_shared(problem, plan, device)
    sources = []
    if problem.has_prefix:
        sources.append((problem.kv_dtype, problem.v_aliases_k_pool))
    if not problem.unified:
        sources.append((problem.dtype, problem.v_aliases_k_new))
    buffers = 0
    for dtype, v_is_k in sources:
        block_dv = 0 if v_is_k else block_head_dim_v(problem.head_dim_v)
        if tile.num_stages == 1:  # nothing is prefetched: K is gone when V comes
            needed = tile.block_n * max(block_d, block_dv) * size
        else:
            converted = dtype != problem.dtype
            direct = shared_operands and not converted
            dims = block_d + block_pe + block_dv
            needed = (tile.num_stages - (not direct)) * tile.block_n * dims * ELEMENT_SIZE[dtype]
            if shared_operands and converted:
                needed += tile.block_n * max(block_d, block_dv) * size
        buffers = max(buffers, needed)
    query = tile.block_m * (block_d + block_pe) * size
    if tile.block_m == tile.block_n == BLOCK_MIN and tile.num_stages == 1:
        return query + buffers  # nothing smaller to step down to: given the benefit of the doubt
    weights = 0 if shared_operands else tile.block_m * tile.block_n * size
    return query + buffers + weights + SCRATCH


def _reads_shared(problem: Problem, plan: Plan, device: DeviceSpec) -> bool:
    """Whether products run on warp-group tensor cores (Hopper, data-centre Blackwell), which take K and V from shared
    memory: 16-bit types and at least 64 rows."""
    major = 0 if isinstance(device.capability, str) else device.capability[0]
    warp_group = major in (9, 10, 11)
    return warp_group and plan.tile.block_m >= 64 and plan.tile.num_warps >= 4 and problem.dtype != "float32"


def accumulator_registers(problem: Problem, plan: Plan, device: DeviceSpec) -> int:
    """Registers of one thread that hold the output accumulator and one tile of logits, both fp32."""
    tile = plan.tile
    elements = tile.block_m * (block_head_dim_v(problem.head_dim_v) + tile.block_n)
    return elements // (tile.num_warps * device.warp_size)


def illegal(problem: Problem, plan: Plan, device: DeviceSpec) -> Optional[str]:
    """Why ``plan`` cannot run ``problem`` on ``device``, or None if it can."""
    tile = plan.tile
    if plan.family == "packed":
        if plan.pack_gqa:
            return "pack_gqa: a flag of the tiled family; the packed family always packs"
        if plan.tma:
            return "tma: only the tiled family loads through TMA descriptors"
    elif plan.split_kv > 1:
        return f"split_kv: {plan.split_kv}; only the packed family splits a sequence's keys"
    if plan.tma:
        reason = _no_tma(problem, device)
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


def _no_tma(problem: Problem, device: DeviceSpec) -> Optional[str]:
    if not device.at_least(9):
        return f"needs sm_90 or newer, not {device.arch}"
    if problem.unified:
        return "a unified call has no contiguous new K/V; its keys are all gathered"
    if problem.alignment < TMA_ALIGNMENT:
        return f"base pointers and strides are aligned to {problem.alignment} bytes; {TMA_ALIGNMENT} are needed"
    return None
