"""The launch of the kernel that gathers prefixes, ahead of one that reads their rows one after the other."""

from __future__ import annotations

from typing import List, Tuple

import torch

from ..inputs import Inputs
from ..plan.blocks import next_power_of_2
from ..plan.tile import Plan
from ..problem import Problem
from .compat import CAN_PDL, launch_options
from .gather_prefix import gather_prefix_kernel
from .launch_plain import pool_of
from .recipe import Kernel, kernel, strides
from .workspace import Workspace

# Elements of a program's block of keys, and programs a multiprocessor, which hide one another's latency. Blocks of four
# times the size take 178 registers a thread.
BLOCK_ELEMENTS, PROGRAMS = 2048, 8


def prefix_rows(problem: Problem, dtype: torch.dtype) -> Tuple[Workspace, Workspace]:
    """Room for the gathered rows of keys and of values."""
    heads = problem.num_kv_indices * problem.num_kv_heads
    return (
        Workspace("k_prefix", heads * problem.head_dim_qk, dtype),
        Workspace("v_prefix", heads * problem.head_dim_v, dtype),
    )


def gather_before(plan: Plan, inputs: Inputs, problem: Problem, multiprocessors: int) -> Kernel:
    """The kernel that fills ``prefix_rows``."""
    block_d, block_dv = next_power_of_2(problem.head_dim_qk), next_power_of_2(problem.head_dim_v)
    rows = max(1, BLOCK_ELEMENTS // max(block_d, block_dv))
    pdl = plan.pdl and CAN_PDL
    constants = dict(
        NUM_KV_HEADS=problem.num_kv_heads,
        HEAD_DIM=problem.head_dim_qk,
        HEAD_DIM_V=problem.head_dim_v,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        ROWS=rows,
        PDL=pdl,
    )
    blocks = -(-problem.num_kv_indices // rows) * problem.num_kv_heads
    return kernel(
        gather_prefix_kernel,
        max(1, min(blocks, PROGRAMS * multiprocessors)),
        (*strides(inputs.k_pool), *strides(inputs.v_pool), inputs.batch_size),
        constants,
        num_warps=4,
        **launch_options(pdl),
    )


def gather_tensors(inputs: Inputs, *rows: torch.Tensor) -> List[object]:
    """With the numbers in ``gather_before``, the one place that knows the order of gather_prefix_kernel's arguments;
    ``rows`` are those of ``prefix_rows``."""
    return [pool_of(inputs.k_pool), pool_of(inputs.v_pool), inputs.kv_indptr, inputs.kv_indices, *rows]
