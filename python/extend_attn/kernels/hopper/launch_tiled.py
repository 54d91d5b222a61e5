"""The launch of the tiled Hopper family."""

from __future__ import annotations

import functools
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...inputs import Inputs
from ...plan.legality_hopper_tiled import (
    LATENT_REST,
    RING_SLOTS,
    ROWS,
    WARPS,
    code_columns,
    latent,
    shares_ring,
    tiled_blocks,
    tiled_items,
    tiled_parts,
    tiled_queries,
    tiled_sections,
)
from ...plan.tile import Plan
from ...problem import Problem
from ..compat import launch_options
from ..launch_gather import gather_before, gather_tensors, prefix_rows
from ..recipe import Recipe, features, kernel, scalars, strides
from ..workspace import Workspace
from .launch_packed import FP8_CODES, PATIENCE, codes_of, mask_bytes, multiprocessors
from .tiled import tiled_kernel
from .tiled_copies import HEADER

# By consumers: registers a thread of the launch, and what setmaxnreg makes of them for (consumers, producer). TMA and a
# gather take 40, with 24 TMA spills between loads; a gather takes 56 where keys are split (one_chunk 93 us with 40, 76
# with 56). A conversion of fp8 codes holds a tile of them, beside the walk a few rows, a mask its bytes.
REGISTERS = {2: (168, (232, 40)), 4: (96, (112, 32))}
SPLIT_GATHER_REGISTERS, FP8_REGISTERS, BESIDE_REGISTERS = (224, 56), (216, 80), (216, 72)
PRODUCER_WARPS = 4  # that gather
PANEL = 64  # columns of a TMA box of the pool: see tiled_producer.py
RAGGED_ROWS = 1 << 30  # see tiled_producer.py
RAGGED_END = 0x7FFF0000  # more than any row


def recipe_of(plan: Plan, inputs: Inputs, problem: Problem) -> Recipe:
    """What ``plan`` launches for calls like this one."""
    heads = 2 if plan.pack_gqa else 1
    consumers = plan.tile.num_warps // WARPS
    blocks = 1 if heads == 2 or latent(problem) else consumers  # of 64 tokens a program
    columns, chunks, block_dv, slices = tiled_blocks(problem)
    one_ring = shares_ring(problem, plan)
    queries = tiled_queries(problem, plan)
    # the output leaves through the query's place
    staged = (queries > 1 or slices > 1) and plan.split_kv == 1
    staged = staged and inputs.o.dtype == inputs.q.dtype
    stages = RING_SLOTS if one_ring else plan.tile.num_stages
    tokens = blocks * ROWS
    row_blocks = -(-problem.max_len_extend // tokens)
    items = tiled_items(problem, heads, tokens)
    programs = multiprocessors(inputs.q.device)
    parts = tiled_parts(problem, plan.split_kv, items, programs)
    split = parts > 1
    on = features(inputs, problem)
    on["CAUSAL"] = on["CAUSAL"] and not on["MASK"]
    gathered = plan.gather and on["HAS_POOL"]
    gather = (on["HAS_POOL"] and not gathered) or on["MASK"]
    beside = gathered and plan.gather == "beside"
    fp8 = FP8_CODES.get(problem.kv_dtype, 0) if on["HAS_POOL"] and (beside or not gathered) else 0
    most, registers = REGISTERS[consumers]
    if beside:
        registers = BESIDE_REGISTERS
    elif fp8 or on["MASK"]:
        registers = FP8_REGISTERS
    elif gather and split and plan.tile.block_n <= 64 and not latent(problem):
        registers = SPLIT_GATHER_REGISTERS
    constants: Dict[str, Any] = dict(
        CONSUMERS=consumers,
        NUM_HEADS=problem.num_q_heads,
        GROUP=problem.group,
        HEADS=heads,
        HEAD_DIM=problem.head_dim_qk,
        HEAD_DIM_V=problem.head_dim_v,
        BLOCK_N=plan.tile.block_n,
        K_COLUMNS=columns,
        K_CHUNKS=chunks,
        BLOCK_DV=block_dv,
        V_SLICES=slices,
        QUERIES=queries,
        K_STAGES=stages * chunks,
        V_STAGES=stages,
        ONE_RING=one_ring,
        STAGED=staged,
        LATENT=latent(problem),
        APART=latent(problem) and not (problem.unified or problem.v_aliases_k_new),
        SPLIT=split,
        PDL=plan.pdl,
        HAS_POOL=on["HAS_POOL"],
        UNIFIED=problem.unified,
        FP8=fp8,
        **{name: on[name] for name in _FEATURES},
        NEGATE=inputs.sm_scale < 0,
        CONSUMER_REGISTERS=registers[0],
        PRODUCER_REGISTERS=registers[1],
        PRODUCER_WARPS=PRODUCER_WARPS if gather else 1,
        CODE_COLUMNS=code_columns(problem) if fp8 and not beside else 0,
    )
    numbers = (
        *strides(inputs.k_pool), *strides(inputs.v_pool), *strides(inputs.v_new), *strides(inputs.o), PATIENCE,
        problem.batch_size, row_blocks, parts, tiled_sections(problem, items), *scalars(inputs),
    )  # fmt: skip
    tiled = kernel(
        tiled_kernel,
        min(items * parts, programs),
        numbers,
        constants,
        num_warps=4,
        maxnreg=most,
        **launch_options(plan.pdl),
    )
    keys, box, values = plan.tile.block_n, columns, block_dv
    if latent(problem):
        keys, box, values = keys // 2, LATENT_REST, LATENT_REST
    boxes = (ROWS, box), (keys, box), (keys, values), (ROWS, block_dv) if staged else None
    runs = None
    if on["HAS_POOL"] and latent(problem) and not on["MASK_PREFIX"]:  # elsewhere looking costs more
        runs = keys, PANEL
    tensors = functools.partial(_tensors, boxes, runs)
    own: Tuple[Workspace, ...] = ()
    if split:
        tiles = row_blocks * blocks * problem.batch_size * problem.num_q_heads * slices
        rows = tiles * parts * ROWS
        own = Workspace("partial", rows * block_dv), Workspace("partial_ml", rows * 2)
        own = (*own, Workspace("arrivals", tiles, torch.int32, zeroed=True))
    if not gathered:
        return Recipe((tiled,), tensors, own)
    prefixes = prefix_rows(problem, inputs.q.dtype)
    if beside:
        words = HEADER.value + (problem.num_kv_indices // keys + problem.batch_size + 1) * problem.num_kv_heads
        ready = Workspace("ready", words, torch.int32, zeroed=True)
        return Recipe((tiled,), functools.partial(_tensors_beside, boxes), (*prefixes, ready))
    first = gather_before(plan, inputs, problem, programs)
    return Recipe((first, tiled), functools.partial(_tensors_ahead, boxes), (*prefixes, *own))


_FEATURES = (
    "CAUSAL", "WINDOW", "MASK", "MASK_PREFIX", "SINKS", "CAP", "TEMPERATURE", "Q_POSITIONS", "LSE", "V_SCALED",
)  # fmt: skip


Boxes = Tuple[Optional[Tuple[int, int]], ...]  # rows and columns of the TMA boxes of Q, K, V and O
Runs = Optional[Tuple[int, int]]  # and of those of the pool's keys


def _tensors(boxes: Boxes, runs: Runs, i: Inputs, *parts: torch.Tensor) -> Tuple[List[object], ...]:
    return (_tiled_tensors(boxes, runs, (), None, i, *parts),)


def _tensors_ahead(boxes: Boxes, i: Inputs, *own: torch.Tensor) -> Tuple[List[object], ...]:
    return gather_tensors(i, *own[:2]), _tiled_tensors(boxes, None, own[:2], None, i, *own[2:])


def _tensors_beside(boxes: Boxes, i: Inputs, *own: torch.Tensor) -> Tuple[List[object], ...]:
    return (_tiled_tensors(boxes, None, own[:2], own[2], i),)


def _tiled_tensors(
    boxes: Boxes,
    runs: Runs,
    prefixes: Sequence[torch.Tensor],
    ready: Optional[torch.Tensor],
    i: Inputs,
    *parts: torch.Tensor,
) -> List[object]:
    """With ``numbers`` above, the one place that knows the order of tiled_kernel's arguments. ``prefixes``: gathered
    keys and values, if they are; ``ready``: the words of their units, if this kernel gathers them."""
    partial, partial_ml, arrivals = parts or (None, None, None)
    k_rows, v_rows = (None, None) if ready is None else prefixes
    k_prefix = v_prefix = None
    if prefixes:  # in the boxes of new tokens
        k_prefix, v_prefix = (
            ragged_descriptor(rows_like(pool, t), *box)
            for pool, t, box in zip((i.k_pool, i.v_pool), prefixes, boxes[1:3])
        )
    rows = [i.q if t is None else t for t in (i.q, i.k_new, i.v_new, i.o)]  # a unified call has no new ones: never used
    return [
        *(None if box is None else ragged_descriptor(t, *box) for t, box in zip(rows, boxes)),
        None if runs is None else run_descriptor(i.k_pool, *runs),
        k_prefix, v_prefix, k_rows, v_rows, ready, i.v_new, codes_of(i.k_pool), codes_of(i.v_pool), i.o, i.lse,
        i.qo_indptr, i.kv_indptr, i.kv_indices, i.prefix_lens, mask_bytes(i), i.mask_indptr, i.sinks,
        i.window_offsets, i.q_positions, partial, partial_ml, arrivals,
    ]  # fmt: skip


def rows_like(pool: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Flat ``memory`` as contiguous rows [indices, heads, dim] of the pool's heads and dims."""
    heads, dim = pool.shape[1:]
    rows = memory.numel() // (heads * dim)
    return memory[: rows * heads * dim].view(rows, heads, dim)


def ragged_descriptor(t: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A TMA descriptor of ``t`` [rows, heads, dim] for boxes of one head, whose rows can end where a sequence does.

    At coordinates (RAGGED_ROWS, end, RAGGED_ROWS - length + row, head, column) the first two strides have moved the
    base by ``RAGGED_ROWS * 2**34`` elements of two bytes, which is nothing modulo 2^64, and to the row; past ``length``
    the third coordinate is out of bounds, and the hardware gives zeros.
    """
    row_stride = t.stride(0) if t.shape[0] > 1 else 8
    head_stride = t.stride(1) if t.shape[1] > 1 else 8
    return TensorDescriptor(
        t,
        [RAGGED_END, RAGGED_END, RAGGED_ROWS, t.shape[1], t.shape[2]],
        [2**34 - row_stride, row_stride, row_stride, head_stride, 1],
        [1, 1, rows, 1, columns],
        _layout(columns * t.element_size()),
    )


def run_descriptor(pool: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A TMA descriptor of a pool [slots, heads, dim] for boxes of consecutive slots of one head. Slots are in bounds:
    their number does not matter."""
    slot_stride, head_stride = (pool.stride(d) if pool.shape[d] > 1 else PANEL for d in (0, 1))
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    shape = [RAGGED_END, pool.shape[1], pool.shape[2]]
    return TensorDescriptor(pool, shape, [slot_stride, head_stride, 1], [rows, 1, columns], layout)


@functools.cache
def _layout(row_bytes: int) -> NVMMASharedLayout:
    return NVMMASharedLayout(swizzle_byte_width=min(row_bytes, 128), element_bitwidth=16, rank=5)
