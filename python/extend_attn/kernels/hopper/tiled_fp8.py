"""The tiled Hopper kernel's producer for fp8 pools: rows are copied as codes a tile ahead, and then converted.

Shared memory holds three tiles of codes: keys and values alike, in the order in which consumers ask for them. The tile
that is converted leaves two on their way.
"""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .fp8_staged import convert, copy_layout, stage
from .tiled_gather import slots_of
from .tiled_masks import some_row_sees
from .tiled_producer import load_keys, load_query, new_values
from .tiled_schedule import announce, announce_first, announced, search_at
from .tiled_work import key_place, new_tokens, tiles_of, value_place

CODE_TILES = gl.constexpr(3)  # places for tiles of codes


@gluon.jit
def _pooled(tiles, t, c):
    """Whether tile t comes from the pool, and is there."""
    pooled = (t >= tiles.begin) & (t < tiles.end)
    if not c.UNIFIED:
        pooled = pooled & (t >= tiles.new_tiles)
    return pooled


@gluon.jit
def _put_keys(place, ring, n, ARRIVALS: gl.constexpr, c):
    HALF: gl.constexpr = ring.slots.dtype == gl.float16
    for chunk in gl.static_range(c.K_CHUNKS):
        at = n * c.K_CHUNKS + chunk
        ring.wait_empty(at)
        convert(place, ring.slot(at), chunk * c.K_COLUMNS, c.FP8, HALF)
        ring.hand_over(at, ARRIVALS)


@gluon.jit
def _put_values(place, ring, n, ARRIVALS: gl.constexpr, c):
    ring.wait_empty(n)
    convert(place, ring.slot(n), 0, c.FP8, ring.slots.dtype == gl.float16)
    ring.hand_over(n, ARRIVALS)


@gluon.jit
def produce_fp8(sources, call, memory, staged, ARRIVALS: gl.constexpr, c):
    """As tiled_producer.produce. Place ``step`` of ``staged`` holds keys of tile t, the next values of tile t - 1, the
    third keys of tile t + 1; values of tile t follow into the first as soon as its keys are converted."""
    LAYOUT: gl.constexpr = copy_layout(c.BLOCK_N, staged.shape[2], gl.num_warps())
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    n = 0
    number = 0
    total, item, kv_start = announce_first(memory.board, call, c)
    while item.extend_len != 0:
        tiles = tiles_of(item, call, c)
        head = item.head_block * c.HEADS // c.GROUP
        kv_indices = sources.kv_indices + kv_start
        k_pool = sources.k_pool + head.to(gl.int64) * sources.stride_kg
        v_pool = sources.v_pool + head.to(gl.int64) * sources.stride_vg
        slots = slots_of(kv_indices, item, tiles, tiles.begin, ROWS, c)
        following = slots_of(kv_indices, item, tiles, tiles.begin + 1, ROWS, c)
        if c.QUERIES > 1:
            load_query(sources.q, item, memory, number, c)
        if _pooled(tiles, tiles.begin, c):
            stage(staged.index(0), k_pool, slots, sources.stride_ks, slots, c.HEAD_DIM, False, LAYOUT)
        async_copy.commit_group()
        async_copy.commit_group()  # of values of no tile
        step = gl.to_tensor(0)
        for t in range(tiles.begin, tiles.end + 1):
            keys_at = key_place(n, t, tiles, c)
            values_at = value_place(n - 1, t - 1, tiles, c)
            ahead = slots_of(kv_indices, item, tiles, t + 2, ROWS, c)
            keys = staged.index(step % CODE_TILES)
            if _pooled(tiles, t + 1, c):
                place = staged.index((step + 2) % CODE_TILES)
                stage(place, k_pool, following, sources.stride_ks, following, c.HEAD_DIM, False, LAYOUT)
            async_copy.commit_group()
            if t < tiles.end:
                if _pooled(tiles, t, c):
                    async_copy.wait_group(2)
                    _put_keys(keys, memory.k_ring, keys_at, ARRIVALS, c)
                else:
                    load_keys(
                        sources.k, new_tokens(item), tiles.new_hi - 1 - t, head, memory.k_ring, keys_at, ARRIVALS, c
                    )
            if _pooled(tiles, t, c):
                exists = slots
                if c.MASK_PREFIX:
                    exists = some_row_sees(t, tiles, item, call, LAYOUT, c)
                stage(keys, v_pool, slots, sources.stride_vs, exists, c.HEAD_DIM_V, c.MASK_PREFIX, LAYOUT)
            async_copy.commit_group()
            if t == tiles.begin:
                if c.QUERIES == 1:
                    load_query(sources.q, item, memory, number, c)
            elif _pooled(tiles, t - 1, c):
                async_copy.wait_group(2)
                place = staged.index((step + 1) % CODE_TILES)
                _put_values(place, memory.v_ring, values_at, ARRIVALS, c)
            else:
                new_values(sources, item, tiles, t - 1, head, memory.v_ring, values_at, ARRIVALS, call, c)
            if t == search_at(tiles):
                announce(memory.board, number + 1, total, call, c)
            slots = following
            following = ahead
            step += 2
            n += 1
        n -= 1
        number += 1
        item, kv_start = announced(memory.board, number, c)
