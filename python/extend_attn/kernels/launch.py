"""Launches a plan over checked inputs. No decisions: what to run is in the plan, what on is in the inputs."""

from __future__ import annotations

import functools
import math
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import triton

from ..inputs import Inputs
from ..plan.blocks import block_head_dim, block_head_dim_v
from ..plan.tile import Plan
from ..problem import Problem
from .combine import combine_kernel
from .compat import CAN_PDL, INTERPRETED, OutOfResources, launch_options, tensor_descriptor
from .extend import extend_kernel

__all__ = ["KernelNotLoaded", "OutOfResources", "Recipe", "kernels_of", "launch", "recipe_of"]


class KernelNotLoaded(RuntimeError):
    """A kernel would have to be compiled or loaded while a CUDA graph is being captured."""


class Kernel(NamedTuple):
    """One launch but for its tensors, which come before ``numbers``. ``constants`` are the compile-time arguments and
    options by name; a launch passes the former by position (``values``), which is cheaper to bind."""

    function: Any
    grid: Tuple[int]
    numbers: tuple
    constants: Dict[str, Any]
    values: tuple
    options: Dict[str, Any]


class Recipe(NamedTuple):
    """All that a plan launches but the tensors: the same for all calls of one problem with these scalars and strides.

    ``boxes`` are the shapes of the TMA boxes of K and V; ``partial`` the elements of the splits' results, and of their
    maxima and sums.
    """

    extend: Kernel
    combine: Optional[Kernel]
    boxes: Optional[Tuple[List[int], List[int]]]
    partial: Tuple[int, int]


def launch(plan: Plan, inputs: Inputs, problem: Problem, recipe: Optional[Recipe] = None) -> List[tuple]:
    """Enqueues the kernels of ``plan`` on the current stream of the inputs' device.

    Returns what was launched: (kernel, grid, arguments, constants) each. ``recipe`` is that of the plan and inputs, if
    it is there already.

    Raises ``OutOfResources`` (nothing enqueued) if the tile does not fit the device, ``KernelNotLoaded``
    (nothing enqueued) if the stream is capturing and a kernel is not loaded yet.
    """
    if problem.batch_size == 0 or problem.max_len_extend == 0 or problem.num_tokens == 0:
        return []
    device = inputs.q.device
    if device.type == "cpu":
        return _launch_interpreted(plan, inputs, problem, recipe)
    if device.index == torch.cuda.current_device():
        return _launch(plan, inputs, problem, recipe)
    with torch.cuda.device(device):
        return _launch(plan, inputs, problem, recipe)


def _launch(plan: Plan, inputs: Inputs, problem: Problem, recipe: Optional[Recipe]) -> List[tuple]:
    recipe = recipe_of(plan, inputs, problem) if recipe is None else recipe
    kernels = kernels_of(plan, inputs, problem, recipe)
    if not INTERPRETED and torch.cuda.is_current_stream_capturing():
        _require_loaded(kernels)
    for kernel, (_, _, arguments, _) in zip((recipe.extend, recipe.combine), kernels):
        # what kernel[grid](...) does
        kernel.function.run(*arguments, *kernel.values, grid=kernel.grid, warmup=False, **kernel.options)
    return kernels


def kernels_of(plan: Plan, inputs: Inputs, problem: Problem, recipe: Optional[Recipe] = None) -> List[tuple]:
    """(kernel, grid, arguments, constants) of each launch that ``plan`` takes, in order."""
    recipe = recipe_of(plan, inputs, problem) if recipe is None else recipe
    extend, combine = recipe.extend, recipe.combine
    if combine is None:
        return [(extend.function, extend.grid, _extend_arguments(inputs, None, None, recipe), extend.constants)]
    # from the caching allocator: per stream when eager, the graph's own under capture
    partial, partial_ml = (torch.empty(n, dtype=torch.float32, device=inputs.q.device) for n in recipe.partial)
    arguments = [inputs.o, inputs.qo_indptr, inputs.sinks, inputs.lse, partial, partial_ml, *combine.numbers]
    return [
        (extend.function, extend.grid, _extend_arguments(inputs, partial, partial_ml, recipe), extend.constants),
        (combine.function, combine.grid, arguments, combine.constants),
    ]


def recipe_of(plan: Plan, inputs: Inputs, problem: Problem) -> Recipe:
    """What ``plan`` launches for calls like this one."""
    packed = plan.family == "packed"
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
        ONE_SEQUENCE=problem.batch_size == 1,
        TMA=plan.tma,
        PDL=pdl,
    )
    boxes = None
    block_d, block_dv = constants["BLOCK_D"], constants["BLOCK_DV"]
    if plan.tma:  # one tile of one head
        boxes = [plan.tile.block_n, 1, block_d], [plan.tile.block_n, 1, block_dv]
    extend = _kernel(
        extend_kernel,
        tiles * splits,
        _numbers(inputs, splits, row_blocks),
        constants,
        num_warps=plan.tile.num_warps,
        num_stages=plan.tile.num_stages,
    )
    if splits == 1:
        return Recipe(extend, None, boxes, (0, 0))
    constants = dict(
        NUM_HEADS=problem.num_q_heads,
        HEAD_DIM_V=problem.head_dim_v,
        BLOCK_DV=block_dv,
        SINKS=problem.sinks,
        LSE=problem.return_lse,
        BLOCK_M=block_m,
        ROWS=rows,
        CHUNK=max(2, min(triton.next_power_of_2(splits), 4096 // block_dv)),
        PDL=pdl,
    )
    combine = _kernel(
        combine_kernel,
        tiles * block_m,
        (*_strides(inputs.o), splits, row_blocks),
        constants,
        num_warps=4,
        **launch_options(pdl),
    )
    slots = tiles * splits * block_m
    return Recipe(extend, combine, boxes, (slots * block_dv, slots * 2))


def _kernel(function: Any, programs: int, numbers: tuple, constants: Dict[str, Any], **options: Any) -> Kernel:
    """``constants`` are the kernel's compile-time parameters, which come last, in their order."""
    assert function.arg_names[-len(constants) :] == list(constants), function.arg_names
    return Kernel(function, (programs,), numbers, {**constants, **options}, tuple(constants.values()), options)


def _extend_arguments(
    inputs: Inputs, partial: Optional[torch.Tensor], partial_ml: Optional[torch.Tensor], recipe: Recipe
) -> List[object]:
    """With ``_numbers``, the one place that knows the order of extend_kernel's arguments."""
    (q, k_new, v_new, o, k_pool, v_pool, qo_indptr, kv_indptr, kv_indices, prefix_lens, mask, mask_indptr, sinks,
     window_offsets, q_positions, lse) = inputs[:_NUM_TENSORS]  # fmt: skip
    k_desc = v_desc = None
    if recipe.boxes is not None:
        k_desc, v_desc = (tensor_descriptor(t, box) for t, box in zip((k_new, v_new), recipe.boxes))
    if mask is not None:
        mask = mask.view(torch.uint8)
    return [
        q, k_new, v_new, o, _pool(k_pool), _pool(v_pool), k_desc, v_desc,
        qo_indptr, kv_indptr, kv_indices, prefix_lens, mask, mask_indptr,
        sinks, window_offsets, q_positions, lse, partial, partial_ml, *recipe.extend.numbers,
    ]  # fmt: skip


def _numbers(i: Inputs, splits: int, row_blocks: int) -> tuple:
    length = i.xai_temperature_len
    return (
        *_strides(i.q), *_strides(i.k_new), *_strides(i.v_new), *_strides(i.o),
        *_strides(i.k_pool), *_strides(i.v_pool),
        i.batch_size, i.sliding_window,
        abs(i.sm_scale) * _LOG2E, abs(i.sm_scale) * i.k_scale * _LOG2E, i.v_scale, i.logit_cap,
        length, math.log2(length) if length > 1 else 1.0,
        splits, row_blocks,
    )  # fmt: skip


_LOG2E = math.log2(math.e)
_NUM_TENSORS = Inputs._fields.index("batch_size")


def _pool(t: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """The pool as the kernel reads it (see fp8.py): codes as bytes where Triton's conversion is missing or wrong.

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


def _strides(t: Optional[torch.Tensor]) -> Tuple[int, int]:
    return t.stride()[:2] if t is not None else (0, 0)


def _constants(inputs: Inputs, problem: Problem) -> dict:
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
        HAS_POOL=inputs.k_pool is not None,
        UNIFIED=problem.unified,
        CAUSAL=problem.is_causal,
        WINDOW=problem.sliding_window > 0,
        MASK=problem.custom_mask,
        MASK_PREFIX=problem.mask_prefix,
        SINKS=problem.sinks,
        CAP=problem.logit_cap > 0,
        TEMPERATURE=problem.xai_temperature_len > 1,
        Q_POSITIONS=problem.q_positions,
        LSE=problem.return_lse,
        V_SCALED=inputs.v_scale != 1.0 and inputs.k_pool is not None,
        V_IS_K_POOL=problem.v_aliases_k_pool and block_dv == block_d,
        V_IS_K_NEW=problem.v_aliases_k_new and block_dv == block_d,
        NEGATE_Q=inputs.sm_scale < 0,
    )


def _require_loaded(kernels: list) -> None:
    """Under capture nothing may be loaded: a compile would stall it and a module load can break it."""
    for kernel, grid, arguments, constants in kernels:
        compiled = kernel.warmup(*arguments, grid=grid, **constants)
        if compiled.module is None:
            raise KernelNotLoaded(
                f"{kernel.__name__}: not loaded, and a CUDA graph is being captured; run extend_attn.warmup(problems) "
                "or one eager call of this shape before the capture"
            )


def _launch_interpreted(plan: Plan, inputs: Inputs, problem: Problem, recipe: Optional[Recipe]) -> List[tuple]:
    """TRITON_INTERPRET=1 on CPU tensors. The interpreter multiplies the raw bits of bf16 and truncates its stores,
    so bf16 is widened to fp32 first and the output rounded by PyTorch."""
    if inputs.q.dtype != torch.bfloat16:
        return _launch(plan, inputs, problem, recipe)
    widened = {
        name: t.float()
        for name in ("q", "k_new", "v_new", "o", "k_pool", "v_pool")
        for t in (getattr(inputs, name),)
        if t is not None and t.dtype == torch.bfloat16
    }
    wide = inputs._replace(**widened)
    kernels = _launch(plan, wide, wide.problem(), None)
    inputs.o.copy_(wide.o)
    return kernels
