"""The loop over key tiles that every kernel of the plain Triton families runs.

Keys of a sequence are numbered by a *key index* local to their source: the pool (gathered through ``slots``) or the
new tokens' own rows. ``attend`` walks tiles of ``BLOCK_N`` consecutive key indices of one source and folds them into
the running softmax state of a tile of query rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fp8 import dequantise
from .softmax import logits, step


@triton.jit
def load_rows(rows, columns, exists, dim: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr):
    """Rows of K or V [N, len(columns)]; a row that does not exist (MASKED) or a column past ``dim`` (not EVEN) is 0
    and never read."""
    pointers = rows[:, None] + columns[None, :]
    if MASKED:
        if EVEN:
            return tl.load(pointers, mask=exists[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=exists[:, None] & (columns < dim)[None, :], other=0.0)
    else:
        if EVEN:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(columns < dim)[None, :], other=0.0)


@triton.jit
def attend(
    # state of the tile's rows: accumulator [M, BLOCK_DV], running maximum and sum [M] (base 2)
    acc,
    m_i,
    l_i,
    # queries: [M, BLOCK_D] and, where the head dim is split, [M, BLOCK_PE]
    q,
    q_pe,
    # keys and values of this KV head: base pointers, row strides, slot of each key index (GATHER)
    k_ptr,
    v_ptr,
    stride_k,
    stride_v,
    slots,
    # TMA: descriptors of K and V [rows, heads, dim], this sequence's first row in them, this KV head
    k_desc,
    v_desc,
    desc_row,
    desc_head,
    # tiles: ``count`` of them from ``first``; from the ``hole``-th on, ``skip`` tiles further
    first,
    count,
    hole,
    skip,
    # MASKED: only keys in [key_lo, key_hi) exist, and only rows in row_ok
    key_lo,
    key_hi,
    row_ok,
    # CAUSAL: row sees key <= row_limit; WINDOW: position(row) <= position(key) + window
    row_limit,
    row_pos,
    window,
    pos_shift,
    positions,
    first_new,
    # MASK: byte of (row, key) at mask_rows[row] + key
    mask_rows,
    # logits
    scale,
    logit_cap,
    temperature,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_PE: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GATHER: tl.constexpr,
    V_IS_K: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    Q_POSITIONS: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    TMA: tl.constexpr,
):
    PRECISE: tl.constexpr = q.dtype == tl.float32
    RAW: tl.constexpr = not (MASKED or (CAP or TEMPERATURE))
    offs_n = tl.arange(0, BLOCK_N)

    if GATHER:  # slots are loaded one tile ahead, so that a row's address is there when its turn comes
        key = (first + tl.where(hole > 0, 0, skip)) * BLOCK_N + offs_n
        slot = tl.load(slots + key, mask=(key >= key_lo) & (key < key_hi), other=0)

    for i in tl.range(0, count):
        start = (first + i + tl.where(i >= hole, skip, 0)) * BLOCK_N
        key = start + offs_n
        if GATHER:
            row = slot.to(tl.int64)
            ahead = (first + i + 1 + tl.where(i + 1 >= hole, skip, 0)) * BLOCK_N + offs_n
            slot = tl.load(slots + ahead, mask=(ahead >= key_lo) & (ahead < key_hi) & (i + 1 < count), other=0)
        else:
            row = key.to(tl.int64)
        exists = (key >= key_lo) & (key < key_hi)

        k_rows = k_ptr + row * stride_k
        if TMA:
            k = k_desc.load([desc_row + start, desc_head, 0]).reshape([BLOCK_N, BLOCK_D])
        else:
            k = load_rows(k_rows, tl.arange(0, BLOCK_D), exists, HEAD_DIM, HEAD_DIM >= BLOCK_D, MASKED)
            k = dequantise(k, q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if BLOCK_PE > 0:
            offs_pe = BLOCK_D + tl.arange(0, BLOCK_PE)
            k_pe = load_rows(k_rows, offs_pe, exists, HEAD_DIM, HEAD_DIM == BLOCK_D + BLOCK_PE, MASKED)
            s = tl.dot(q_pe, tl.trans(dequantise(k_pe, q.dtype)), s, input_precision="ieee")

        if not RAW:
            s = logits(s, scale, logit_cap, temperature, CAP, TEMPERATURE, PRECISE)
        if MASKED:
            seen = row_ok[:, None] & exists[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= row_limit[:, None])
            if WINDOW:
                key_pos = pos_shift + key
                if Q_POSITIONS:
                    new = key >= first_new
                    key_pos = tl.where(new, tl.load(positions + key, mask=exists & new, other=0), key_pos)
                seen = seen & (row_pos[:, None] <= key_pos[None, :] + window)
            if MASK:
                seen = seen & (tl.load(mask_rows[:, None] + key[None, :], mask=seen, other=0) != 0)
            s = tl.where(seen, s, float("-inf"))
        p, alpha, m_i, l_i = step(s, m_i, l_i, scale, RAW, MASKED)

        if V_IS_K:
            v = k
        elif TMA:
            v = v_desc.load([desc_row + start, desc_head, 0]).reshape([BLOCK_N, BLOCK_DV])
        else:
            v_rows = v_ptr + row * stride_v
            v = load_rows(v_rows, tl.arange(0, BLOCK_DV), exists, HEAD_DIM_V, HEAD_DIM_V == BLOCK_DV, MASKED)
            v = dequantise(v, q.dtype)
        if MASK:  # 0 * NaN is NaN: a value that no row of the tile sees may hold anything
            v = tl.where((tl.max(seen.to(tl.int32), 0) > 0)[:, None], v, 0.0).to(q.dtype)
        if PRECISE:
            # A sum for the tile, then over tiles: one running sum over thousands of keys loses a digit. The condition
            # always holds; without it the compiler would fold the addition back into the product's accumulator.
            part = tl.dot(p, v, input_precision="ieee")
            acc = acc * alpha[:, None] + tl.where(alpha[:, None] != -1.0, part, 0.0)
        else:
            acc = tl.dot(p.to(q.dtype), v, acc * alpha[:, None])
    return acc, m_i, l_i
