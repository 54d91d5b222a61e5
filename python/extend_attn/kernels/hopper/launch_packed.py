"""The launch of the packed Hopper family."""

from __future__ import annotations

import functools
from typing import Any, Dict, List, Optional, Tuple

import torch

from ...inputs import Inputs
from ...plan.legality_hopper import is_fp8, packed_blocks, packed_registers, v_is_k
from ...plan.tile import Plan
from ...problem import Problem
from ..compat import launch_options
from ..recipe import NUM_TENSORS, Recipe, features, kernel, numbers
from ..workspace import Workspace
from .packed import packed_kernel

PRODUCER_WARPS = 4
# How often a program looks whether the others of its pair have arrived, half a microsecond each, before it hands its
# slice of the merge over. Programs of one wave do not end together, since the memory does not serve all alike: with 32
# looks many hand over, and lists of 32000 keys took 43.0 us on an H200, where a launch to merge took 37.5.
PATIENCE = 1024
INT32_MAX = 2**31 - 1
FP8_CODES = {"float8_e4m3fn": 1, "float8_e5m2": 2}  # as fp8_rows.py names them


def recipe_of(plan: Plan, inputs: Inputs, problem: Problem) -> Recipe:
    """What ``plan`` launches for calls like this one."""
    tile, group = plan.tile, problem.group
    row_blocks = -(-problem.max_len_extend * group // tile.block_m)
    tiles = problem.batch_size * row_blocks * problem.num_kv_heads
    splits = plan.split_kv
    slots = 0 if inputs.k_pool is None else min(inputs.k_pool.shape[0], INT32_MAX)
    patience = PATIENCE if tiles * splits <= multiprocessors(inputs.q.device) else 0
    registers, consumer_registers, producer_registers = packed_registers(problem, plan)
    consumers = tile.num_warps // 4
    constants = dict(
        _constants(inputs, problem),
        V_HALF=is_fp8(problem) and problem.dtype == "bfloat16" and not v_is_k(problem) and consumers == 1,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        STAGES=tile.num_stages,
        CONSUMERS=consumers,
        SPLIT=splits > 1,
        EVEN=plan.programs > 0,
        PDL=plan.pdl,
        PRODUCER_WARPS=PRODUCER_WARPS,
        CONSUMER_REGISTERS=consumer_registers,
        PRODUCER_REGISTERS=producer_registers,
    )
    packed = kernel(
        packed_kernel,
        plan.programs or tiles * splits,
        (*numbers(inputs, splits, row_blocks), patience, min(inputs.kv_indices.numel(), INT32_MAX), slots),
        constants,
        num_warps=4,  # of one consumer
        maxnreg=registers,
        **launch_options(plan.pdl),
    )
    if splits == 1 and plan.programs == 0:
        return Recipe((packed,), _tensors)
    rows = (2 * plan.programs or tiles * splits) * tile.block_m
    return Recipe(
        (packed,),
        _tensors,
        (
            Workspace("partial", rows * constants["BLOCK_D"]),
            Workspace("partial_ml", rows * 2),
            Workspace("arrivals", tiles * consumers, torch.int32, zeroed=True),
        ),
    )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # compiled for one that is not here
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tensors(inputs: Inputs, *parts: torch.Tensor) -> Tuple[List[object], ...]:
    """With ``recipe.numbers``, the one place that knows the order of packed_kernel's arguments."""
    partial, partial_ml, arrivals = parts or (None, None, None)
    (q, k_new, v_new, o, k_pool, v_pool, qo_indptr, kv_indptr, kv_indices, prefix_lens, _, mask_indptr, sinks,
     window_offsets, q_positions, lse) = inputs[:NUM_TENSORS]  # fmt: skip
    tensors = [
        q, k_new, v_new, o, codes_of(k_pool), codes_of(v_pool),
        qo_indptr, kv_indptr, kv_indices, prefix_lens, mask_bytes(inputs), mask_indptr,
        sinks, window_offsets, q_positions, lse, partial, partial_ml, arrivals,
    ]  # fmt: skip
    return (tensors,)


def codes_of(pool: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """An fp8 pool as bytes."""
    return pool.view(torch.uint8) if pool is not None and pool.dtype.itemsize == 1 else pool


def mask_bytes(inputs: Inputs) -> Optional[torch.Tensor]:
    """A mask as bytes."""
    mask = inputs.custom_mask
    return None if mask is None else mask.view(torch.uint8)


def _constants(inputs: Inputs, problem: Problem) -> Dict[str, Any]:
    block_d, block_pe = packed_blocks(problem)
    fp8 = is_fp8(problem)
    scaled = problem.has_pool and (inputs.k_scale != 1.0 or inputs.v_scale != 1.0)
    on = features(inputs, problem)
    return dict(
        NUM_HEADS=problem.num_q_heads,
        GROUP=problem.group,
        HEAD_DIM=problem.head_dim_qk,
        HEAD_DIM_V=problem.head_dim_v,
        BLOCK_D=block_d,
        BLOCK_PE=block_pe,
        **{**on, "V_SCALED": on["V_SCALED"] or fp8},  # one kernel for all scales
        V_IS_K=v_is_k(problem),
        NEGATE_Q=inputs.sm_scale < 0,
        APART=(fp8 or scaled) and not problem.unified,
        FP8=FP8_CODES[problem.kv_dtype] if fp8 else 0,
    )
