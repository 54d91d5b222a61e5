"""Which keys the rows of a tile see: what exists, the diagonal, the window, a custom mask.

A sequence's keys are numbered as a mask's columns are: its prefix, then its new tokens.
"""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_compat import constexpr_function
from .tiled_work import ROWS, offset_of

# Where the key tiles of a loop lie.
NEW, POOL, BOTH = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
# Which tiles of a loop are masked.
NONE, END, SOME, ALL = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2), gl.constexpr(3)
BYTES_AT_ONCE = gl.constexpr(16)  # of a mask, in a thread of the producer: all of them on their way together


@gluon.jit
def before_end(item, c):
    """Which columns of the prefix's last tile there are."""
    key = gl.arange(0, c.BLOCK_N, layout=gl.SliceLayout(0, c.S))
    return (key < item.prefix_len % c.BLOCK_N)[None, :]


@gluon.jit
def first_key(t, tiles, item, KEYS: gl.constexpr, c):
    """(number of tile t's first key, where the keys of its kind end)."""
    start = item.prefix_len + (tiles.new_hi - 1 - t) * c.BLOCK_N
    limit = item.prefix_len + item.extend_len
    if KEYS == BOTH:
        new = t < tiles.new_tiles
        start = gl.where(new, start, (tiles.pool_hi - 1 - (t - tiles.new_tiles)) * c.BLOCK_N)
        limit = gl.where(new, limit, item.prefix_len)
    return start, limit


@gluon.jit
def seen(t, tiles, place, item, call, KEYS: gl.constexpr, c):
    """[ROWS, BLOCK_N]: which keys of tile t a consumer's rows see."""
    start, limit = first_key(t, tiles, item, KEYS, c)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, c.S))
    column = gl.arange(0, c.BLOCK_N, layout=gl.SliceLayout(0, c.S))
    return sees((column < limit - start)[None, :], place.row0, row, start, column, item, call, c)


@gluon.jit
def hide(s, t, tiles, place, item, call, KEYS: gl.constexpr, c):
    """Logits of tile t, masked where ``place`` does not say that every row sees all of it."""
    whole = (t > place.begin) & (t < place.stop_new) | ((t >= place.start_pool) & (t < place.stop_pool))
    if not whole:
        s = gl.where(seen(t, tiles, place, item, call, KEYS, c), s, float("-inf"))
    return s


@gluon.jit
def sees(exists, first, row, start, column, item, call, c):
    """``exists`` [rows, keys] without the keys ``start`` + ``column`` that token ``first`` + ``row`` does not see. A
    mask decides alone over causality. It is addressed in 64 bits up to the tile and in 32, half the registers, inside:
    256 rows of 2^23 columns."""
    token = first + row
    key = start + column
    visible = exists
    if c.CAUSAL:
        visible = visible & (key[None, :] <= (item.prefix_len + token)[:, None])
    if c.BY_POSITION:
        positions = call.q_positions + item.q_start
        new = key - item.prefix_len
        is_new = (new >= 0) & (new < item.extend_len)
        row_position = gl.load(positions + token, mask=token < item.extend_len, other=0)
        key_position = gl.load(positions + new, mask=is_new, other=0)
        key_position = gl.where(new >= 0, key_position, key + offset_of(item, call, c))
        visible = visible & (row_position[:, None] <= (key_position + call.window)[None, :])
    elif c.WINDOW:
        visible = visible & ((item.prefix_len + token)[:, None] <= (key + call.window)[None, :])
    if c.MASK:
        cut = gl.to_tensor(0)
        if not c.UNIFIED:  # columns of keys that the engine has cut off
            cut = offset_of(item, call, c)
        stride = item.prefix_len + item.extend_len + cut
        tile = call.custom_mask + gl.load(call.mask_indptr + item.sequence) + first.to(gl.int64) * stride
        offset = (row * stride + (cut + start))[:, None] + column[None, :]  # no part of it to be kept between tiles
        told = visible & (token < item.extend_len)[:, None]
        if not c.MASK_PREFIX:
            told = told & (key >= item.prefix_len)[None, :]
        visible = visible & (gl.load(tile + offset, mask=told, other=1) != 0)
    return visible


@constexpr_function
def mask_warps(keys, warps):
    """Warps that share keys."""
    return warps // min(keys // 32, warps)


@constexpr_function
def mask_layout(keys, warps):
    """Keys along a warp's lanes, whose bytes lie side by side; warps that are left over take other tokens."""
    return gl.BlockedLayout([1, 1], [1, 32], [mask_warps(keys, warps), warps // mask_warps(keys, warps)], [1, 0])


@gluon.jit
def _any_of_a_thread(seen, WARPS: gl.constexpr):
    """[WARPS, keys] of [tokens, keys]: whether a thread's own tokens see a key."""
    return gl.max(seen.reshape([seen.shape[0] // WARPS, WARPS, seen.shape[1]]), 0)


@gluon.jit
def some_row_sees(t, tiles, item, call, LAYOUT: gl.constexpr, c):
    """[BLOCK_N]: which keys of tile t any row of the item sees, for the producer. A value that none does may be NaN,
    which a weight of 0 would let through."""
    BYTES: gl.constexpr = mask_layout(c.BLOCK_N, gl.num_warps())
    STEP: gl.constexpr = BYTES_AT_ONCE * gl.num_warps() * 32 // c.BLOCK_N
    start, limit = first_key(t, tiles, item, BOTH, c)
    column = gl.arange(0, c.BLOCK_N, layout=gl.SliceLayout(0, BYTES))
    WARPS: gl.constexpr = mask_warps(c.BLOCK_N, gl.num_warps())
    found = _any_of_a_thread(gl.zeros([STEP, c.BLOCK_N], gl.int32, BYTES), WARPS)
    stop = gl.minimum(item.first + c.TOKENS, item.extend_len)
    row = gl.arange(0, STEP, layout=gl.SliceLayout(1, BYTES))
    for first in range(item.first, stop, STEP):
        real = (first + row < stop)[:, None] & (column < limit - start)[None, :]
        visible = sees(real, first, row, start, column, item, call, c)
        found = gl.maximum(found, _any_of_a_thread(visible.to(gl.int32), WARPS))
    return gl.convert_layout(gl.max(found, 0), gl.SliceLayout(1, LAYOUT)) != 0
