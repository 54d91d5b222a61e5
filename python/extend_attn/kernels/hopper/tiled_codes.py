"""The tiled Hopper kernel's producer where the pool is fp8: codes pass through registers on their way into the rings.

A tile is cut into pieces of columns, keys' and values' in the order in which they are stored; each is loaded two pieces
before it is converted, so that loads are under way while the producer waits for a slot.
"""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .fp8_rows import load_codes, put_codes
from .tiled_masks import some_row_sees
from .tiled_producer import load_keys, load_query, new_values, no_slots, slots_of
from .tiled_schedule import announce, announced, count_blocks, search_at
from .tiled_work import key_place, tiles_of, value_place

PIECE_CODES = gl.constexpr(8192)  # 16 words a thread of four warps


@gluon.jit
def _rows(base, head, slots, stride_row, stride_head, LAYOUT: gl.constexpr):
    """Pointers to rows of codes as words of four."""
    words = base.to(gl.pointer_type(gl.int32), bitcast=True) + head.to(gl.int64) * (stride_head // 4)
    return words + gl.convert_layout(slots.slots, gl.SliceLayout(1, LAYOUT)).to(gl.int64) * (stride_row // 4)


@gluon.jit
def _load(sources, head, slots, wanted, seen, item, V: gl.constexpr, NUMBER: gl.constexpr, PIECE: gl.constexpr,
          LAYOUT: gl.constexpr, c):  # fmt: skip
    """Piece NUMBER of a tile's keys or values (V); zeros if it is not ``wanted``, for values also if not ``seen``."""
    exists = gl.full([c.BLOCK_N], 0, gl.int32, gl.SliceLayout(1, LAYOUT)) + wanted.to(gl.int32) != 0
    if V:
        if c.MASK_PREFIX:
            exists = exists & seen
        rows = _rows(sources.v_pool, head, slots, sources.stride_vs, sources.stride_vg, LAYOUT)
        rows += item.v_slice * (c.BLOCK_DV // 4)
        return load_codes(rows, exists, NUMBER * PIECE, PIECE, c.HEAD_DIM_V, LAYOUT)
    else:
        rows = _rows(sources.k_pool, head, slots, sources.stride_ks, sources.stride_kg, LAYOUT)
        return load_codes(rows, exists, NUMBER * PIECE, PIECE, c.HEAD_DIM, LAYOUT)


@gluon.jit
def _put(codes, ring, n, NUMBER: gl.constexpr, PIECE: gl.constexpr, c):
    """Converts piece NUMBER of the tile whose first slot is ``n``, and says so when a slot has its last piece."""
    PIECES: gl.constexpr = ring.slots.shape[2] // PIECE  # of a slot
    at = n + NUMBER // PIECES
    if NUMBER % PIECES == 0:
        ring.wait_empty(at)
    put_codes(ring.slot(at), codes, NUMBER % PIECES * PIECE, c.FP8, ring.slots.dtype == gl.float16)
    if NUMBER % PIECES == PIECES - 1:
        fence_async_shared()
        mbarrier.arrive(ring.filled(at), count=gl.num_warps() * 32)


@gluon.jit
def produce_codes(sources, call, memory, ARRIVALS: gl.constexpr, c):
    """As ``produce`` in tiled_producer.py."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [gl.num_warps(), 1], [1, 0])  # words: 8 codes a thread
    PIECE: gl.constexpr = min(PIECE_CODES // c.BLOCK_N, c.K_COLUMNS, c.BLOCK_DV)
    KEYS: gl.constexpr = c.K_COLUMNS * c.K_CHUNKS // PIECE
    ALL: gl.constexpr = KEYS + c.BLOCK_DV // PIECE
    total = count_blocks(call, c)
    n = 0
    number = 0
    turn = 0
    announce(memory.board, turn, total, call, c)
    item, kv_start = announced(memory.board, turn, call, c)
    while item.extend_len != 0:
        tiles = tiles_of(item, call, c)
        works = tiles.begin < tiles.end
        pooled = tiles.begin if c.UNIFIED else gl.maximum(tiles.begin, tiles.new_tiles)  # the first tile of codes
        head = item.head_block * c.HEADS // c.GROUP
        kv_indices = sources.kv_indices + kv_start
        slots = no_slots(c)  # of tile t - 1
        following = slots_of(kv_indices, item, tiles, tiles.begin, c)
        ahead = slots_of(kv_indices, item, tiles, tiles.begin + 1, c)
        has_key = works & (tiles.begin >= pooled)
        seen = following.slots  # which keys of tile t - 1 and of tile t some row sees
        seen_next = seen
        if c.MASK_PREFIX:
            seen_next = some_row_sees(tiles.begin, tiles, item, call, LAYOUT, c)
            seen = seen_next
        codes = _load(sources, head, following, has_key, seen, item, False, 0, PIECE, LAYOUT, c)
        after = codes  # there are no values yet
        if KEYS > 1:
            after = _load(sources, head, following, has_key, seen, item, False, 1, PIECE, LAYOUT, c)
        for t in range(tiles.begin, tiles.end + 1):
            keys_at = key_place(n, t, tiles, c)
            values_at = value_place(n - 1, t - 1, tiles, c)
            later = slots_of(kv_indices, item, tiles, t + 2, c)
            has_key = (t < tiles.end) & (t >= pooled)
            has_value = t > pooled
            next_key = (t + 1 < tiles.end) & (t + 1 >= pooled)
            if t < tiles.end:
                if t < pooled:
                    load_keys(sources.k, item, tiles.new_hi - 1 - t, head, memory.k_ring, keys_at, ARRIVALS, c)
            for i in gl.static_range(ALL):
                if i + 2 < KEYS:
                    then = _load(sources, head, following, has_key, seen, item, False, i + 2, PIECE, LAYOUT, c)
                elif i + 2 < ALL:
                    then = _load(sources, head, slots, has_value, seen, item, True, i + 2 - KEYS, PIECE, LAYOUT, c)
                elif i + 2 < ALL + KEYS:
                    then = _load(sources, head, ahead, next_key, seen, item, False, i + 2 - ALL, PIECE, LAYOUT, c)
                else:
                    piece: gl.constexpr = i + 2 - ALL - KEYS
                    then = _load(sources, head, following, has_key, seen_next, item, True, piece, PIECE, LAYOUT, c)
                if i < KEYS:
                    if has_key:
                        _put(codes, memory.k_ring, keys_at * c.K_CHUNKS, i, PIECE, c)
                elif has_value:
                    _put(codes, memory.v_ring, values_at, i - KEYS, PIECE, c)
                codes = after
                after = then
            if t == tiles.begin:
                if works:
                    load_query(sources.q, item, memory, number, c)
            elif t <= pooled:
                new_values(sources, item, tiles, t - 1, head, memory.v_ring, values_at, ARRIVALS, call, c)
            if t == search_at(tiles):
                announce(memory.board, turn + 1, total, call, c)
            if c.MASK_PREFIX:
                seen = seen_next
                seen_next = some_row_sees(gl.minimum(t + 1, tiles.end - 1), tiles, item, call, LAYOUT, c)
            slots = following
            following = ahead
            ahead = later
            n += 1
        n -= 1
        number += works.to(gl.int32)
        turn += 1
        item, kv_start = announced(memory.board, turn, call, c)
