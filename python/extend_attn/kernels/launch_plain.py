"""The launches of the plain Triton families."""

from __future__ import annotations

import functools
from typing import Any, Dict, List, Optional, Tuple

import torch

from ..inputs import Inputs
from ..plan.blocks import block_head_dim, block_head_dim_v
from ..plan.tile import Plan
from ..problem import Problem
from .compat import CAN_PDL, tensor_descriptor
from .extend import extend_kernel
from .launch_combine import combine_after, combine_tensors
from .recipe import NUM_TENSORS, Recipe, features, kernel, numbers


def recipe_of(plan: Plan, inputs: Inputs, problem: Problem) -> Recipe:
    """What ``plan`` launches for calls like this one."""
    packed = plan.packed
    rows = problem.group if packed or plan.pack_gqa else 1
    block_m = plan.tile.block_m
    head_blocks = problem.num_q_heads // rows
    row_blocks = -(-problem.max_len_extend * rows // block_m)
    if packed:
        tiles = problem.batch_size * row_blocks * head_blocks
    else:  # an upper bound that a host knows; the device finds out which blocks there are
        ragged = -(-problem.num_tokens * rows // block_m) + problem.batch_size
        tiles = min(problem.batch_size * row_blocks, ragged) * head_blocks
    splits = plan.split_kv if packed else 1
    pdl = plan.pdl and splits > 1 and CAN_PDL
    constants = dict(
        _constants(inputs, problem),
        BLOCK_M=block_m,
        BLOCK_N=plan.tile.block_n,
        ROWS=rows,
        PACKED=packed,
        SPLIT=splits > 1,
        TMA=plan.tma,
        PDL=pdl,
    )
    boxes = None
    block_d, block_dv = constants["BLOCK_D"], constants["BLOCK_DV"]
    if plan.tma:  # one tile of one head
        boxes = [plan.tile.block_n, 1, block_d], [plan.tile.block_n, 1, block_dv]
    extend = kernel(
        extend_kernel,
        tiles * splits,
        numbers(inputs, splits, row_blocks),
        constants,
        num_warps=plan.tile.num_warps,
        num_stages=plan.tile.num_stages,
    )
    if splits == 1:
        return Recipe((extend,), functools.partial(_tensors, boxes))
    combine, workspaces = combine_after(plan, inputs, problem, block_dv, tiles, row_blocks, pdl)
    return Recipe((extend, combine), functools.partial(_tensors_of_splits, boxes), workspaces)


Boxes = Optional[Tuple[List[int], List[int]]]  # the shapes of the TMA boxes of K and V


def _tensors(boxes: Boxes, inputs: Inputs) -> Tuple[List[object], ...]:
    return (_extend_tensors(inputs, boxes, None, None),)


def _tensors_of_splits(boxes: Boxes, inputs: Inputs, *parts: torch.Tensor) -> Tuple[List[object], ...]:
    partial, partial_ml = parts
    return _extend_tensors(inputs, boxes, partial, partial_ml), combine_tensors(inputs, *parts)


def _extend_tensors(
    inputs: Inputs, boxes: Boxes, partial: Optional[torch.Tensor], partial_ml: Optional[torch.Tensor]
) -> List[object]:
    """With ``recipe.numbers``, the one place that knows the order of extend_kernel's arguments."""
    (q, k_new, v_new, o, k_pool, v_pool, qo_indptr, kv_indptr, kv_indices, prefix_lens, mask, mask_indptr, sinks,
     window_offsets, q_positions, lse) = inputs[:NUM_TENSORS]  # fmt: skip
    k_desc = v_desc = None
    if boxes is not None:
        k_desc, v_desc = (tensor_descriptor(t, box) for t, box in zip((k_new, v_new), boxes))
    if mask is not None:
        mask = mask.view(torch.uint8)
    return [
        q, k_new, v_new, o, pool_of(k_pool), pool_of(v_pool), k_desc, v_desc,
        qo_indptr, kv_indptr, kv_indices, prefix_lens, mask, mask_indptr,
        sinks, window_offsets, q_positions, lse, partial, partial_ml,
    ]  # fmt: skip


def pool_of(t: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """The pool as a plain kernel reads it (see fp8.py): codes as bytes where Triton's conversion is missing or wrong.

    Its e5m2 to bf16 turns Inf and NaN codes into numbers (seen with 3.6 on sm_90).
    """
    if t is not None and t.dtype == torch.float8_e5m2:
        return t.view(torch.int8)
    if t is not None and t.dtype == torch.float8_e4m3fn and not converts_e4m3(t.device):
        return t.view(torch.uint8)
    return t


@functools.cache
def converts_e4m3(device: torch.device) -> bool:
    """Whether Triton converts e4m3 on this device: from sm_89 on; the interpreter takes NaN codes for numbers."""
    if device.type == "cpu":
        return False
    if device.type == "meta":  # compiled for an architecture that may not be here
        return True
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _constants(inputs: Inputs, problem: Problem) -> Dict[str, Any]:
    """What a compiled kernel is specialised for: dims and features, so that a feature that is off costs nothing."""
    block_d, block_pe = block_head_dim(problem.head_dim_qk)
    block_dv = block_head_dim_v(problem.head_dim_v, problem.head_dim_qk)
    return dict(
        NUM_HEADS=problem.num_q_heads,
        GROUP=problem.group,
        HEAD_DIM=problem.head_dim_qk,
        HEAD_DIM_V=problem.head_dim_v,
        BLOCK_D=block_d,
        BLOCK_PE=block_pe,
        BLOCK_DV=block_dv,
        **features(inputs, problem),
        V_IS_K_POOL=problem.v_aliases_k_pool and block_dv == block_d,
        V_IS_K_NEW=problem.v_aliases_k_new and block_dv == block_d,
        NEGATE_Q=inputs.sm_scale < 0,
    )
