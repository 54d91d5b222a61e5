"""Merges the partial results of the plain packed family's splits in their order, so that repeats are bit-identical."""

from __future__ import annotations

import triton
import triton.language as tl

from .compat import gdc_wait
from .rows import finish

UNSPECIALIZED = ["num_splits", "row_blocks"]
UNALIGNED = ["qo_indptr", "sinks", "lse"]


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def combine_kernel(
    o,
    qo_indptr,
    sinks,
    lse,
    partial,
    partial_ml,
    stride_ot,
    stride_oh,
    num_splits,
    row_blocks,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row. ``partial`` [tiles, num_splits, BLOCK_M, BLOCK_DV], ``partial_ml`` [tiles, num_splits, 2,
    BLOCK_M] (maximum and sum in base 2; a split without keys left a sum of 0 and no accumulator).

    All loads of a step are issued before any is used: an accumulator that is not there is read, and not taken.
    """
    HEAD_BLOCKS: tl.constexpr = NUM_HEADS // ROWS
    tile = tl.program_id(0) // BLOCK_M
    r = tl.program_id(0) % BLOCK_M
    head_block = tile % HEAD_BLOCKS
    block = tile // HEAD_BLOCKS % row_blocks
    b = tile // HEAD_BLOCKS // row_blocks
    q_start = tl.load(qo_indptr + b).to(tl.int64)
    extend_len = (tl.load(qo_indptr + b + 1) - q_start).to(tl.int32)
    token = (block * BLOCK_M + r) // ROWS
    if token >= extend_len:
        return
    head = head_block * ROWS + (block * BLOCK_M + r) % ROWS
    if PDL:
        gdc_wait()

    start = tile.to(tl.int64) * num_splits
    i = tl.arange(0, CHUNK)
    d = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([1, BLOCK_DV], tl.float32)
    m_i = tl.full([1], float("-inf"), tl.float32)
    l_i = tl.zeros([1], tl.float32)
    for first in tl.range(0, num_splits, CHUNK, num_stages=1):
        slot = start + first + i
        ok = first + i < num_splits
        m = tl.load(partial_ml + slot * (2 * BLOCK_M) + r, mask=ok, other=float("-inf"))
        l = tl.load(partial_ml + slot * (2 * BLOCK_M) + BLOCK_M + r, mask=ok, other=0.0)
        part = tl.load(partial + (slot * BLOCK_M + r)[:, None] * BLOCK_DV + d[None, :], mask=ok[:, None], other=0.0)
        used = l != 0.0
        part = tl.where(used[:, None], part, 0.0)
        m_new = tl.maximum(m_i, tl.max(m, 0))
        finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - finite)
        weight = tl.exp2(m - tl.max(finite, 0))
        l_i = l_i * alpha + tl.sum(tl.where(used, weight * l, 0.0), 0)
        acc = acc * alpha[:, None] + tl.sum(part * weight[:, None], 0)[None, :]
        m_i = m_new

    row = q_start + token + tl.arange(0, 1)
    finish(
        acc,
        m_i,
        l_i,
        o + row * stride_ot + head.to(tl.int64) * stride_oh,
        lse + row * NUM_HEADS + head if LSE else o,
        row >= 0,
        sinks + head + tl.arange(0, 1) if SINKS else o,
        HEAD_DIM_V,
        BLOCK_DV,
        SINKS,
        LSE,
    )
