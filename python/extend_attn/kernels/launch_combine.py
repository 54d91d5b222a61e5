"""The launch of the combine kernel, after plain kernels that share a tile's keys (the Hopper families merge by
themselves)."""

from __future__ import annotations

from typing import List, Tuple

import torch

from ..inputs import Inputs
from ..plan.tile import Plan
from ..problem import Problem
from .combine import combine_kernel
from .compat import launch_options
from .recipe import Kernel, kernel, strides
from .workspace import Workspace

# Elements of the parts' results in one step of a combine program: 16 parts at head dim 256, or 64. Two sizes for all
# numbers of parts, so that a model compiles few combine kernels; a part that is not there is masked.
COMBINE_ELEMENTS = (4096, 16384)


def combine_after(
    plan: Plan, inputs: Inputs, problem: Problem, block_dv: int, tiles: int, row_blocks: int, pdl: bool
) -> Tuple[Kernel, Tuple[Workspace, ...]]:  # fmt: skip
    """The combine kernel after ``plan.split_kv`` splits of so many tiles, and its workspaces: the parts' results, their
    maxima and sums."""
    block_m, splits = plan.tile.block_m, plan.split_kv
    few, many = (max(2, elements // block_dv) for elements in COMBINE_ELEMENTS)
    chunk = few if splits <= few else many
    constants = dict(
        NUM_HEADS=problem.num_q_heads,
        HEAD_DIM_V=problem.head_dim_v,
        BLOCK_DV=block_dv,
        SINKS=problem.sinks,
        LSE=problem.return_lse,
        BLOCK_M=block_m,
        ROWS=problem.group,
        CHUNK=chunk,
        PDL=pdl,
    )
    combine = kernel(
        combine_kernel,
        tiles * block_m,
        (*strides(inputs.o), splits, row_blocks),
        constants,
        num_warps=4 if chunk == few else 8,
        **launch_options(pdl),
    )
    rows = tiles * splits * block_m
    return combine, (Workspace("partial", rows * block_dv), Workspace("partial_ml", rows * 2))


def combine_tensors(inputs: Inputs, *parts: torch.Tensor) -> List[object]:
    """With the numbers in ``combine_after``, the one place that knows the order of combine_kernel's arguments;
    ``parts`` are its workspaces."""
    return [inputs.o, inputs.qo_indptr, inputs.sinks, inputs.lse, *parts]
