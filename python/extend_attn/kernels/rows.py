"""The query rows of a tile: which token and head a row is, its loads, limits and stores.

A tile's rows are packed: row ``r`` of a sequence is token ``r // GROUP``, head ``r % GROUP`` of the ``GROUP`` heads
that the tile serves (all query heads of a KV head, or one). Any group size works, also 3, 5 or 7.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import add_sink, natural_lse, normalise


@triton.jit
def token_and_head(block, extend_len, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(token, head within the group, is the row real) [BLOCK_M] of the tile's rows."""
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = r // GROUP
    return token, r % GROUP, token < extend_len


@triton.jit
def load_query(
    q_rows,
    row_ok,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_PE: tl.constexpr,
    NEGATE: tl.constexpr,
):
    """The query tile, in two parts where the head dim is split; rows that are not real are 0."""
    offs_d = tl.arange(0, BLOCK_D)
    q = tl.load(q_rows[:, None] + offs_d[None, :], mask=row_ok[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    q_pe = q
    if BLOCK_PE > 0:
        offs_pe = BLOCK_D + tl.arange(0, BLOCK_PE)
        q_pe = tl.load(
            q_rows[:, None] + offs_pe[None, :], mask=row_ok[:, None] & (offs_pe < HEAD_DIM)[None, :], other=0.0
        )
    if NEGATE:  # a negative sm_scale: its sign goes here, so that the running maximum may be taken before scaling
        q = -q
        q_pe = -q_pe
    return q, q_pe


@triton.jit
def temperature_of(position, log2_length, length, TEMPERATURE: tl.constexpr):
    """xAI's factor a row: log2(position) / log2(length) past ``length``, 1 before."""
    factor = tl.full(position.shape, 1.0, tl.float32)
    if TEMPERATURE:
        factor = tl.where(
            position > length, tl.log2(tl.maximum(position, 1).to(tl.float32)) / log2_length, factor
        )
    return factor


@triton.jit
def finish(
    acc,
    m_i,
    l_i,
    o_rows,
    lse_rows,
    row_ok,
    sink_rows,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
):
    """Sink, division, and the stores of output and LSE, for a tile whose keys are all folded in."""
    if SINKS:
        sink = tl.load(sink_rows, mask=row_ok, other=float("-inf")).to(tl.float32)
        acc, m_i, l_i = add_sink(acc, m_i, l_i, sink)
    offs_dv = tl.arange(0, BLOCK_DV)
    out = normalise(acc, l_i).to(o_rows.dtype.element_ty)
    tl.store(o_rows[:, None] + offs_dv[None, :], out, mask=row_ok[:, None] & (offs_dv < HEAD_DIM_V)[None, :])
    if LSE:
        tl.store(lse_rows, natural_lse(m_i, l_i), mask=row_ok)
