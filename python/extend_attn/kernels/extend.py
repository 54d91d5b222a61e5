"""The extend kernel: one launch over prefix and new tokens, in two families.

*Tiled* (prefill, chunks): a flat grid of blocks of query rows, longest first (schedule.py), each over its whole key
list. Full tiles run without any mask; the tiles at the window's start, at the prefix's end and on the causal diagonal
run in a loop of their own. Head blocks are the grid's fastest axis, so that heads that share keys run side by side.

*Packed* (verify, decode): few rows, so memory bound. The rows of a tile are the new tokens of all query heads of a KV
head, K/V are read once a KV head, and a sequence's key list may be divided over ``num_splits`` programs whose partial
results combine.py merges. The mask is always on: it hides behind the loads.

Both families share rows, ranges and loops; what differs is the grid, the share of the tiles, and where the result goes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .compat import gdc_launch_dependents
from .loop import attend
from .ranges import new_range, pool_range, split_tiles
from .rows import finish, load_query, temperature_of, token_and_head
from .schedule import find_item

# A split is worth its partial result from about this many keys on.
MIN_SPLIT_KEYS: tl.constexpr = tl.constexpr(128)

UNSPECIALIZED = [
    "window",
    "batch_size",
    "sm_scale",
    "pool_scale",
    "v_scale",
    "logit_cap",
    "temperature_len",
    "log2_temperature_len",
    "num_splits",
    "row_blocks",
]
UNALIGNED = [
    "qo_indptr",
    "kv_indptr",
    "kv_indices",
    "prefix_lens",
    "custom_mask",
    "mask_indptr",
    "sinks",
    "window_offsets",
    "q_positions",
    "lse",
]


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def extend_kernel(
    q,
    k_new,
    v_new,
    o,
    k_pool,
    v_pool,
    k_desc,
    v_desc,
    qo_indptr,
    kv_indptr,
    kv_indices,
    prefix_lens,
    custom_mask,
    mask_indptr,
    sinks,
    window_offsets,
    q_positions,
    lse,
    partial,
    partial_ml,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_ks,
    stride_kg,
    stride_vs,
    stride_vg,
    batch_size,
    window,
    sm_scale,
    pool_scale,
    v_scale,
    logit_cap,
    temperature_len,
    log2_temperature_len,
    num_splits,
    row_blocks,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_PE: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_POOL: tl.constexpr,
    UNIFIED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    MASK_PREFIX: tl.constexpr,
    SINKS: tl.constexpr,
    CAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    Q_POSITIONS: tl.constexpr,
    LSE: tl.constexpr,
    V_SCALED: tl.constexpr,
    V_IS_K_POOL: tl.constexpr,
    V_IS_K_NEW: tl.constexpr,
    NEGATE_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    HEAD_BLOCKS: tl.constexpr = NUM_HEADS // ROWS
    pid = tl.program_id(0)
    if PDL:  # the combine may start up; it waits for this grid's stores by itself
        gdc_launch_dependents()

    # which rows: a sequence, a block of its rows, a block of heads (and, packed, a share of the keys)
    if PACKED:
        split = pid % num_splits
        head_block = (pid // num_splits) % HEAD_BLOCKS
        block = pid // num_splits // HEAD_BLOCKS % row_blocks
        b = pid // num_splits // HEAD_BLOCKS // row_blocks
    else:
        head_block = pid % HEAD_BLOCKS
        b, block = find_item(
            pid // HEAD_BLOCKS,
            qo_indptr,
            kv_indptr,
            batch_size,
            window if WINDOW else 0x7FFFFFFF,
            ROWS,
            BLOCK_M,
        )
        if b < 0:
            return
    q_start = tl.load(qo_indptr + b).to(tl.int64)
    extend_len = (tl.load(qo_indptr + b + 1) - q_start).to(tl.int32)
    if block * BLOCK_M >= extend_len * ROWS:
        return
    kv_start = tl.load(kv_indptr + b).to(tl.int64)
    if UNIFIED:
        prefix_len = tl.load(prefix_lens + b).to(tl.int32)
    else:
        prefix_len = (tl.load(kv_indptr + b + 1) - kv_start).to(tl.int32)
    window_offset = 0
    if window_offsets is not None:
        window_offset = tl.load(window_offsets + b).to(tl.int32)

    # the rows, and what each may see
    token, head, row_ok = token_and_head(block, extend_len, ROWS, BLOCK_M)
    head = head_block * ROWS + head
    kv_head = (head_block * ROWS) // GROUP
    token_first = block * BLOCK_M // ROWS
    token_last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // ROWS, extend_len - 1)
    row = q_start + token
    q_rows = q + row * stride_qt + head.to(tl.int64) * stride_qh
    q_tile, q_pe = load_query(q_rows, row_ok, HEAD_DIM, BLOCK_D, BLOCK_PE, NEGATE_Q)
    row_pos = window_offset + prefix_len + token
    pos_min = window_offset + prefix_len + token_first
    pos_max = window_offset + prefix_len + token_last
    new_positions = q_positions
    if Q_POSITIONS:
        new_positions = q_positions + q_start
        row_pos = tl.load(new_positions + token, mask=row_ok, other=0)
        pos_min = tl.min(tl.where(row_ok, row_pos, 0x7FFFFFFF), 0)
        pos_max = tl.max(tl.where(row_ok, row_pos, -0x7FFFFFFF), 0)
    temperature = temperature_of(row_pos, log2_temperature_len, temperature_len, TEMPERATURE)
    mask_rows = custom_mask
    if MASK:
        mask_cut = 0 if UNIFIED else window_offset  # columns of keys that the engine has cut off
        mask_stride = (prefix_len + extend_len + mask_cut).to(tl.int64)
        mask_rows = custom_mask + (tl.load(mask_indptr + b) + token.to(tl.int64) * mask_stride + mask_cut)

    # which keys
    POOL_CAUSAL: tl.constexpr = UNIFIED and (CAUSAL and not MASK)
    POOL_MASK: tl.constexpr = MASK and (UNIFIED or MASK_PREFIX)
    NEW_CAUSAL: tl.constexpr = CAUSAL and not MASK
    lo, hi, full_lo, full_hi = pool_range(
        prefix_len,
        extend_len,
        window_offset,
        token_first,
        token_last,
        pos_min,
        pos_max,
        window,
        UNIFIED,
        POOL_CAUSAL,
        WINDOW,
        POOL_MASK,
        Q_POSITIONS,
    )
    new_lo, new_hi, new_full_lo, new_full_hi = new_range(
        extend_len, token_first, token_last, window, NEW_CAUSAL, WINDOW, MASK, Q_POSITIONS
    )
    if PACKED:  # every tile is an edge tile; this program's share of pool and new tiles together
        pool_first = lo // BLOCK_N
        pool_count = tl.cdiv(hi, BLOCK_N) - pool_first if HAS_POOL else 0
        new_first = new_lo // BLOCK_N
        new_count = 0 if UNIFIED else tl.cdiv(new_hi, BLOCK_N) - new_first
        if SPLIT:
            total = pool_count + new_count
            share = tl.maximum(tl.cdiv(total, num_splits), tl.cdiv(MIN_SPLIT_KEYS, BLOCK_N))
            begin = tl.minimum(split * share, total)
            end = tl.minimum(begin + share, total)
            pool_first += tl.minimum(begin, pool_count)
            new_first += tl.maximum(begin - pool_count, 0)
            new_count = tl.maximum(end - pool_count, 0) - tl.maximum(begin - pool_count, 0)
            pool_count = tl.minimum(end, pool_count) - tl.minimum(begin, pool_count)
        pool_hole = pool_count
        pool_skip = 0
        new_hole = new_count
        new_skip = 0
        pool_full_first = 0
        pool_full_count = 0
        new_full_first = 0
        new_full_count = 0
    else:
        pool_first, pool_count, pool_hole, pool_skip, pool_full_first, pool_full_count = split_tiles(
            lo, hi, full_lo, full_hi, BLOCK_N
        )
        new_first, new_count, new_hole, new_skip, new_full_first, new_full_count = split_tiles(
            new_lo, new_hi, new_full_lo, new_full_hi, BLOCK_N
        )

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)

    if HAS_POOL:
        slots = kv_indices + kv_start
        k_ptr = k_pool + kv_head.to(tl.int64) * stride_kg
        v_ptr = v_pool + kv_head.to(tl.int64) * stride_vg
        pool_positions = new_positions
        if Q_POSITIONS:
            pool_positions = new_positions - prefix_len
        POOL_PARTS: tl.constexpr = 1 if PACKED or POOL_MASK else 0
        for part in tl.static_range(POOL_PARTS, 2):  # 0: full tiles, 1: edge tiles
            acc, m_i, l_i = attend(
                acc,
                m_i,
                l_i,
                q_tile,
                q_pe,
                k_ptr,
                v_ptr,
                stride_ks,
                stride_vs,
                slots,
                None,
                None,
                0,
                0,
                pool_full_first if part == 0 else pool_first,
                pool_full_count if part == 0 else pool_count,
                pool_full_count if part == 0 else pool_hole,
                0 if part == 0 else pool_skip,
                lo,
                hi,
                row_ok,
                prefix_len + token,
                row_pos,
                window,
                window_offset,
                pool_positions,
                prefix_len,
                mask_rows,
                pool_scale,
                logit_cap,
                temperature,
                HEAD_DIM,
                HEAD_DIM_V,
                BLOCK_D,
                BLOCK_PE,
                BLOCK_DV,
                BLOCK_N,
                True,
                V_IS_K_POOL,
                part == 1,
                POOL_CAUSAL,
                WINDOW,
                Q_POSITIONS and UNIFIED,
                POOL_MASK,
                CAP,
                TEMPERATURE,
                False,
            )
        if V_SCALED:
            acc *= v_scale

    if not UNIFIED:
        if MASK:
            mask_rows += prefix_len
        k_ptr = k_new + q_start * stride_kt + kv_head.to(tl.int64) * stride_kh
        v_ptr = v_new + q_start * stride_vt + kv_head.to(tl.int64) * stride_vh
        NEW_PARTS: tl.constexpr = 1 if PACKED or MASK else 0
        for part in tl.static_range(NEW_PARTS, 2):
            acc, m_i, l_i = attend(
                acc,
                m_i,
                l_i,
                q_tile,
                q_pe,
                k_ptr,
                v_ptr,
                stride_kt,
                stride_vt,
                kv_indices,
                k_desc,
                v_desc,
                q_start.to(tl.int32),
                kv_head,
                new_full_first if part == 0 else new_first,
                new_full_count if part == 0 else new_count,
                new_full_count if part == 0 else new_hole,
                0 if part == 0 else new_skip,
                new_lo,
                new_hi,
                row_ok,
                token,
                row_pos,
                window,
                window_offset + prefix_len,
                new_positions,
                0,
                mask_rows,
                sm_scale,
                logit_cap,
                temperature,
                HEAD_DIM,
                HEAD_DIM_V,
                BLOCK_D,
                BLOCK_PE,
                BLOCK_DV,
                BLOCK_N,
                False,
                V_IS_K_NEW,
                part == 1,
                NEW_CAUSAL,
                WINDOW,
                Q_POSITIONS,
                MASK,
                CAP,
                TEMPERATURE,
                TMA and part == 0,
            )

    if SPLIT:
        r = tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_DV)
        slot = pid.to(tl.int64)
        tl.store(partial_ml + slot * (2 * BLOCK_M) + r, m_i)
        tl.store(partial_ml + slot * (2 * BLOCK_M) + BLOCK_M + r, l_i)
        tl.store(
            partial + (slot * BLOCK_M + r)[:, None] * BLOCK_DV + d[None, :],
            acc,
            mask=row_ok[:, None] & (pool_count + new_count > 0),
        )
    else:
        finish(
            acc,
            m_i,
            l_i,
            o + row * stride_ot + head.to(tl.int64) * stride_oh,
            lse + row * NUM_HEADS + head if LSE else o,
            row_ok,
            sinks + head if SINKS else o,
            HEAD_DIM_V,
            BLOCK_DV,
            SINKS,
            LSE,
        )
