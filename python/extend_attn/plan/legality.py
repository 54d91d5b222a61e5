"""What *can* run: shared memory, registers, architecture. What is preferred is decided elsewhere."""

from __future__ import annotations

from typing import Optional, Tuple

from ..problem import ELEMENT_SIZE, Problem
from .device import DeviceSpec
from .tile import Plan

# 32-bit registers a thread can address (every architecture so far).
REGISTERS_PER_THREAD = 255
MAX_THREADS = 1024
TMA_ALIGNMENT = 16  # bytes: base pointer and strides of a TMA descriptor


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``, for n >= 1."""
    return 1 << (n - 1).bit_length()


def split_head_dim(head_dim: int) -> Tuple[int, int]:
    """(block, rest) of a query/key head dim: powers of two that cover it, the rest 0 unless padding to one block would
    waste much (576 = 512 + 64, 288 = 256 + 32, 192 = 128 + 64)."""
    return {576: (512, 64), 288: (256, 32), 192: (128, 64)}.get(head_dim, (next_power_of_two(head_dim), 0))


def shared_memory_bytes(problem: Problem, plan: Plan, device: DeviceSpec) -> int:
    """Estimate of the shared memory of one block, in bytes.

    ``num_stages`` buffers of a K and a V tile, the query tile, and for an fp8 pool a converted copy of one K and V
    tile. A V that lies in the pool's K takes none; the new tokens' own K and V run through the same buffers afterwards,
    so the larger of the two counts.
    """
    tile = plan.tile
    dim_k = sum(split_head_dim(problem.head_dim_qk))
    dim_v = next_power_of_two(problem.head_dim_v)
    size = ELEMENT_SIZE[problem.dtype]
    pool = new = 0
    if problem.has_prefix:
        dims = dim_k + (0 if problem.v_aliases_k_pool else dim_v)
        pool = tile.num_stages * tile.block_n * dims * ELEMENT_SIZE[problem.kv_dtype]
        if problem.kv_dtype != problem.dtype:
            pool += tile.block_n * dims * size
    if not problem.unified:
        dims = dim_k + (0 if problem.v_aliases_k_new else dim_v)
        new = tile.num_stages * tile.block_n * dims * size
    return max(pool, new) + tile.block_m * dim_k * size


def accumulator_registers(problem: Problem, plan: Plan, device: DeviceSpec) -> int:
    """Registers of one thread that hold the output accumulator and one tile of logits, both fp32."""
    tile = plan.tile
    elements = tile.block_m * (next_power_of_two(problem.head_dim_v) + tile.block_n)
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
    if registers > REGISTERS_PER_THREAD:
        return (
            f"registers: accumulator and logits of {tile} take {registers} registers a thread; "
            f"there are {REGISTERS_PER_THREAD} (smaller block_m, or more warps)"
        )
    needed = shared_memory_bytes(problem, plan, device)
    if needed > device.shared_memory:
        return (
            f"shared memory: {tile} needs about {needed} bytes; {device.name} ({device.arch}) "
            f"gives a block {device.shared_memory} (fewer stages or smaller blocks)"
        )
    return None


def _no_tma(problem: Problem, device: DeviceSpec) -> Optional[str]:
    if not device.at_least(9):
        return f"needs sm_90 or newer, not {device.arch}"
    if problem.unified:
        return "a unified call has no contiguous new K/V; its keys are all gathered"
    if problem.alignment < TMA_ALIGNMENT:
        return f"base pointers and strides are aligned to {problem.alignment} bytes; {TMA_ALIGNMENT} are needed"
    return None
