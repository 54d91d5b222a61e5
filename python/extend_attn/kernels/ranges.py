"""Which keys a tile of query rows can see, and how their tiles divide into full and edge tiles.

All bounds are key indices local to their source (see loop.py) and are computed from lengths on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pool_range(
    prefix_len,
    extend_len,
    window_offset,
    token_first,
    token_last,
    pos_min,
    pos_max,
    window,
    UNIFIED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    Q_POSITIONS: tl.constexpr,
):
    """(lo, hi, full_lo, full_hi) over the pool: some row sees keys of [lo, hi), every row all of [full_lo, full_hi).

    Two-stage the pool holds the prefix; unified it holds prefix and new tokens, so causality ends it.
    """
    lo = 0
    full_lo = 0
    if WINDOW:
        lo = tl.maximum(pos_min - window - window_offset, 0)
        full_lo = tl.maximum(pos_max - window - window_offset, 0)
    if UNIFIED:
        if CAUSAL:
            hi = prefix_len + token_last + 1
            full_hi = prefix_len + token_first + 1
        else:
            hi = prefix_len + extend_len
            full_hi = hi
        if WINDOW and Q_POSITIONS:  # the new tokens' positions are free: any may be seen, none surely
            lo = tl.minimum(lo, prefix_len)
            full_hi = tl.minimum(full_hi, prefix_len)
    else:
        hi = prefix_len
        full_hi = prefix_len
    lo = tl.minimum(lo, hi)
    if MASK:
        full_hi = lo
    return lo, hi, full_lo, full_hi


@triton.jit
def new_range(
    extend_len,
    token_first,
    token_last,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    Q_POSITIONS: tl.constexpr,
):
    """The same over the new tokens' own rows (two-stage)."""
    lo = 0
    full_lo = 0
    if CAUSAL:
        hi = token_last + 1
        full_hi = token_first + 1
    else:
        hi = extend_len
        full_hi = extend_len
    if WINDOW:
        if Q_POSITIONS:
            full_hi = lo
        else:
            lo = tl.minimum(tl.maximum(token_first - window, 0), hi)
            full_lo = tl.maximum(token_last - window, 0)
    if MASK:
        full_hi = lo
    return lo, hi, full_lo, full_hi


@triton.jit
def split_tiles(lo, hi, full_lo, full_hi, BLOCK_N: tl.constexpr):
    """Tiles of [lo, hi): (first, edges, hole, skip, full_first, full_count) as ``attend`` takes them.

    Edge tiles are those before the full ones and those behind; ``hole`` is where the full ones lie between.
    """
    first = lo // BLOCK_N
    stop = tl.maximum(tl.cdiv(hi, BLOCK_N), first)
    full_first = tl.minimum(tl.maximum(tl.cdiv(full_lo, BLOCK_N), first), stop)
    full_stop = tl.minimum(tl.maximum(full_hi // BLOCK_N, full_first), stop)
    hole = full_first - first
    skip = full_stop - full_first
    return first, stop - first - skip, hole, skip, full_first, skip
