"""Launches a plan over checked inputs. No decisions: what to run is in the plan, what on is in the inputs."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import List, Optional, Tuple

import torch
import triton

from ..inputs import Inputs
from ..plan.blocks import block_head_dim, block_head_dim_v
from ..plan.tile import Plan
from ..problem import Problem
from .combine import combine_kernel
from .compat import INTERPRETED, launch_options, tensor_descriptor
from .extend import extend_kernel


class KernelNotLoaded(RuntimeError):
    """A kernel would have to be compiled or loaded while a CUDA graph is being captured."""


def launch(plan: Plan, inputs: Inputs, problem: Problem) -> List[tuple]:
    """Enqueues the kernels of ``plan`` on the current stream of the inputs' device.

    Returns what was launched: (kernel, grid, arguments, constants) each.

    Raises ``triton.OutOfResources`` (nothing enqueued) if the tile does not fit the device, ``KernelNotLoaded``
    (nothing enqueued) if the stream is capturing and a kernel is not loaded yet.
    """
    if problem.batch_size == 0 or problem.max_len_extend == 0 or problem.num_tokens == 0:
        return []
    if inputs.q.device.type == "cpu":
        return _launch_interpreted(plan, inputs, problem)
    if inputs.q.device.index == torch.cuda.current_device():
        return _launch(plan, inputs, problem)
    with torch.cuda.device(inputs.q.device):
        return _launch(plan, inputs, problem)


def _launch(plan: Plan, inputs: Inputs, problem: Problem) -> List[tuple]:
    kernels = kernels_of(plan, inputs, problem)
    if not INTERPRETED and torch.cuda.is_current_stream_capturing():
        _require_loaded(kernels)
    for kernel, grid, arguments, constants in kernels:
        kernel[grid](*arguments, **constants)
    return kernels


def kernels_of(plan: Plan, inputs: Inputs, problem: Problem) -> List[tuple]:
    """(kernel, grid, arguments, constants) of each launch that ``plan`` takes, in order."""
    rows = problem.group if plan.family == "packed" or plan.pack_gqa else 1
    block_m = plan.tile.block_m
    head_blocks = problem.num_q_heads // rows
    row_blocks = triton.cdiv(problem.max_len_extend * rows, block_m)
    if plan.family == "packed":
        tiles = problem.batch_size * row_blocks * head_blocks
    else:  # an upper bound that a host knows; the device finds out which blocks there are
        ragged = triton.cdiv(problem.num_tokens * rows, block_m) + problem.batch_size
        tiles = min(problem.batch_size * row_blocks, ragged) * head_blocks
    splits = plan.split_kv if plan.family == "packed" else 1
    partial = partial_ml = None
    block_dv = block_head_dim_v(problem.head_dim_v)
    if splits > 1:  # from the caching allocator: per stream when eager, the graph's own under capture
        slots = tiles * splits * block_m
        partial = torch.empty(slots * block_dv, dtype=torch.float32, device=inputs.q.device)
        partial_ml = torch.empty(slots * 2, dtype=torch.float32, device=inputs.q.device)
    pdl = plan.pdl and splits > 1
    main = (
        extend_kernel,
        (tiles * splits,),
        _extend_arguments(inputs, partial, partial_ml, splits, row_blocks, _descriptors(plan, inputs, problem)),
        dict(
            _constants(inputs, problem),
            BLOCK_M=block_m,
            BLOCK_N=plan.tile.block_n,
            ROWS=rows,
            PACKED=plan.family == "packed",
            SPLIT=splits > 1,
            ONE_SEQUENCE=problem.batch_size == 1,
            TMA=plan.tma,
            PDL=pdl,
            num_warps=plan.tile.num_warps,
            num_stages=plan.tile.num_stages,
        ),
    )
    kernels = [main]
    if splits > 1:
        combine = (
            combine_kernel,
            (tiles * block_m,),
            [
                inputs.o, inputs.qo_indptr, inputs.sinks, inputs.lse, partial, partial_ml,
                inputs.o.stride(0), inputs.o.stride(1), splits, row_blocks,
            ],
            dict(
                NUM_HEADS=problem.num_q_heads,
                HEAD_DIM_V=problem.head_dim_v,
                BLOCK_DV=block_dv,
                SINKS=problem.sinks,
                LSE=problem.return_lse,
                BLOCK_M=block_m,
                ROWS=rows,
                CHUNK=max(2, min(triton.next_power_of_2(splits), 4096 // block_dv)),
                PDL=pdl,
                num_warps=4,
                **launch_options(pdl),
            ),
        )  # fmt: skip
        kernels.append(combine)
    return kernels


def _extend_arguments(
    inputs: Inputs,
    partial: Optional[torch.Tensor],
    partial_ml: Optional[torch.Tensor],
    splits: int,
    row_blocks: int,
    descriptors: Tuple[object, object],
) -> List[object]:
    """The one place that knows the order of extend_kernel's arguments."""
    i = inputs
    mask = i.custom_mask.view(torch.uint8) if i.custom_mask is not None else None
    length = i.xai_temperature_len
    return [
        i.q, i.k_new, i.v_new, i.o, _pool(i.k_pool), _pool(i.v_pool), *descriptors,
        i.qo_indptr, i.kv_indptr, i.kv_indices, i.prefix_lens, mask, i.mask_indptr,
        i.sinks, i.window_offsets, i.q_positions, i.lse, partial, partial_ml,
        *_strides(i.q), *_strides(i.k_new), *_strides(i.v_new), *_strides(i.o), *_strides(i.k_pool), *_strides(i.v_pool),
        i.batch_size, i.sliding_window,
        abs(i.sm_scale) * _LOG2E, abs(i.sm_scale) * i.k_scale * _LOG2E, i.v_scale, i.logit_cap,
        length, math.log2(length) if length > 1 else 1.0,
        splits, row_blocks,
    ]  # fmt: skip


_LOG2E = math.log2(math.e)


def _descriptors(plan: Plan, inputs: Inputs, problem: Problem) -> Tuple[object, object]:
    """TMA descriptors of the new tokens' K and V, in boxes of one tile of one head."""
    if not plan.tma:
        return None, None
    assert inputs.k_new is not None and inputs.v_new is not None
    return tuple(
        tensor_descriptor(t, [plan.tile.block_n, 1, block])
        for t, block in (
            (inputs.k_new, block_head_dim(problem.head_dim_qk)[0]),
            (inputs.v_new, block_head_dim_v(problem.head_dim_v)),
        )
    )  # type: ignore[return-value]


def _pool(t: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """The pool as the kernel reads it: e4m3 codes as bytes where the architecture has no conversion of its own."""
    if t is not None and t.dtype == torch.float8_e4m3fn and not converts_e4m3(t.device):
        return t.view(torch.uint8)
    return t


@functools.lru_cache(maxsize=None)
def converts_e4m3(device: torch.device) -> bool:
    """Whether Triton converts e4m3 on this device: from sm_89 on, and in the interpreter."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _strides(t: Optional[torch.Tensor]) -> Tuple[int, int]:
    return (t.stride(0), t.stride(1)) if t is not None else (0, 0)


def _constants(inputs: Inputs, problem: Problem) -> dict:
    """What a compiled kernel is specialised for: dims and features, so that a feature that is off costs nothing."""
    block_d, block_pe = block_head_dim(problem.head_dim_qk)
    block_dv = block_head_dim_v(problem.head_dim_v)
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


def _launch_interpreted(plan: Plan, inputs: Inputs, problem: Problem) -> List[tuple]:
    """TRITON_INTERPRET=1 on CPU tensors. The interpreter multiplies the raw bits of bf16 and truncates its stores,
    so bf16 is widened to fp32 first and the output rounded by PyTorch."""
    if inputs.q.dtype != torch.bfloat16:
        return _launch(plan, inputs, problem)
    widened = {
        name: t.float()
        for name in ("q", "k_new", "v_new", "o", "k_pool", "v_pool")
        for t in (getattr(inputs, name),)
        if t is not None and t.dtype == torch.bfloat16
    }
    wide = dataclasses.replace(inputs, **widened)
    kernels = _launch(plan, wide, wide.problem())
    inputs.o.copy_(wide.o)
    return kernels
