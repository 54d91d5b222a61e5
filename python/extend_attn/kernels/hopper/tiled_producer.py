"""The tiled Hopper kernel's producer: query tiles, then key and value tiles in the order that consumers use them.

New tokens come through TMA. Their descriptors are *ragged*: two leading dimensions whose strides cancel (modulo 2^64)
move the end of the tensor to the end of the sequence, so that the hardware fills the rows past it with zeros and a
neighbour's rows are never seen. Prefix rows, and all rows of a unified call, are gathered one by one into the same
rings, by asynchronous copies (of an fp8 pool: tiled_fp8.py); rows past either end of what the item sees repeat a row
that it does see, and their scores are masked.
"""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .addresses import rows_at
from .gluon_compat import struct, tma_load
from .tiled_copies import await_unit, epoch_of, leave, word_of
from .tiled_gather import gather, gather_slots, piece_of, slots_of
from .tiled_masks import some_row_sees
from .tiled_schedule import announce, announce_first, announced, search_at
from .tiled_work import ROWS, Stretch, box_at, box_of, key_place, new_tokens, tiles_of, value_place


@struct
class Sources:
    """Where rows come from: ragged descriptors of q, k and v, the pools [slots, heads, dim] and the slots' numbers; v
    once more, for rows that a mask may hide; descriptors of runs in the key pool. Where prefixes are gathered:
    ragged descriptors of their rows, and beside the walk the rows and ``ready`` (tiled_copies.py)."""

    q: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    k_pool: gl.tensor
    v_pool: gl.tensor
    v_new: gl.tensor
    kv_indices: gl.tensor
    stride_ks: gl.tensor
    stride_kg: gl.tensor
    stride_vs: gl.tensor
    stride_vg: gl.tensor
    stride_vt: gl.tensor
    stride_vh: gl.tensor
    k_runs: tma.tensor_descriptor
    k_prefix: tma.tensor_descriptor
    v_prefix: tma.tensor_descriptor
    k_rows: gl.tensor
    v_rows: gl.tensor
    ready: gl.tensor


@gluon.jit
def load_box(desc, rows, row, head, column, barrier, destination, bytes: gl.constexpr, arrivals: gl.constexpr):
    """Those from ``row`` on of a Stretch, zeros past its end. ``arrivals``: what completes the barrier."""
    if arrivals > 1:
        mbarrier.arrive(barrier, count=arrivals - 1)
    mbarrier.expect(barrier, bytes)
    tma_load(desc, box_of(rows, row, head, column), barrier, destination)


@gluon.jit
def load_query(desc, item, memory, number, c):
    BYTES: gl.constexpr = ROWS * c.K_COLUMNS * c.K_CHUNKS * 2
    for who in gl.static_range(c.CONSUMERS):
        query = number % c.QUERIES * c.CONSUMERS + who
        mbarrier.wait(memory.q_empty.index(query), (number // c.QUERIES & 1) ^ 1)
        mbarrier.expect(memory.q_full.index(query), BYTES)
        row = item.first
        head = item.head_block * c.HEADS
        if c.HEADS == 2:
            head += who
        else:
            row += who * ROWS
        for chunk in gl.static_range(c.K_CHUNKS):
            tma_load(
                desc,
                box_at(item, row, head, chunk * c.K_COLUMNS),
                memory.q_full.index(query),
                memory.q_slots.index(query * c.K_CHUNKS + chunk),
            )


@gluon.jit
def load_keys(desc, rows, tile, head, ring, n, arrivals: gl.constexpr, c):
    BYTES: gl.constexpr = c.BLOCK_N * c.K_COLUMNS * 2
    for chunk in gl.static_range(c.K_CHUNKS):
        at = n * c.K_CHUNKS + chunk
        ring.wait_empty(at)
        load_box(
            desc, rows, tile * c.BLOCK_N, head, chunk * c.K_COLUMNS, ring.filled(at), ring.slot(at), BYTES, arrivals
        )


@gluon.jit
def load_values(desc, rows, tile, head, v_slice, ring, n, arrivals: gl.constexpr, c):
    BYTES: gl.constexpr = c.BLOCK_N * c.BLOCK_DV * 2
    ring.wait_empty(n)
    load_box(desc, rows, tile * c.BLOCK_N, head, v_slice * c.BLOCK_DV, ring.filled(n), ring.slot(n), BYTES, arrivals)


@gluon.jit
def gather_keys(sources, head, slots, ring, n, LAYOUT: gl.constexpr, c):
    """Keys, whose pool slots lie in shared memory."""
    PADDED: gl.constexpr = c.HEAD_DIM != c.K_COLUMNS * c.K_CHUNKS
    base = sources.k_pool + head.to(gl.int64) * sources.stride_kg
    rows = piece_of(base, sources.stride_ks, slots, 0, LAYOUT)
    for chunk in gl.static_range(c.K_CHUNKS):
        at = n * c.K_CHUNKS + chunk
        ring.wait_empty(at)
        gather_slots(
            base, sources.stride_ks, slots, rows, chunk * c.K_COLUMNS, c.HEAD_DIM, PADDED, ring.slot(at),
            ring.filled(at), LAYOUT,
        )  # fmt: skip


@gluon.jit
def gather_values(sources, item, tiles, t, head, slots, ring, n, LAYOUT: gl.constexpr, call, c):
    """Tile t's values, whose pool slots lie in shared memory."""
    PADDED: gl.constexpr = c.HEAD_DIM_V != c.BLOCK_DV * c.V_SLICES
    column = item.v_slice * c.BLOCK_DV
    base = sources.v_pool + head.to(gl.int64) * sources.stride_vg
    if c.MASK_PREFIX:
        exists = some_row_sees(t, tiles, item, call, LAYOUT, c)
        rows = rows_at(base, slots.load(gl.SliceLayout(1, LAYOUT)), sources.stride_vs)
        ring.wait_empty(n)
        gather(rows, exists, column, c.HEAD_DIM_V, True, True, ring.slot(n), LAYOUT)
        async_copy.mbarrier_arrive(ring.filled(n), increment_count=False)
    else:
        rows = piece_of(base, sources.stride_vs, slots, 0, LAYOUT)
        ring.wait_empty(n)
        gather_slots(
            base, sources.stride_vs, slots, rows, column, c.HEAD_DIM_V, PADDED, ring.slot(n), ring.filled(n), LAYOUT
        )


@gluon.jit
def new_rows(sources, item, tiles, t, head, LAYOUT: gl.constexpr, c):
    """Pointers to new tile t's values, where they are contiguous; past the sequence's end they mean nothing."""
    token = (tiles.new_hi - 1 - t) * c.BLOCK_N + gl.arange(0, c.BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
    rows = sources.v_new + head.to(gl.int64) * sources.stride_vh
    return rows + (item.q_start + token).to(gl.int64) * sources.stride_vt


@gluon.jit
def new_values(sources, item, tiles, t, head, ring, n, ARRIVALS: gl.constexpr, call, c):
    """New tile t's values: through TMA, or without those that a mask hides from all rows of the item."""
    if c.MASK:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
        exists = some_row_sees(t, tiles, item, call, LAYOUT, c)
        rows = new_rows(sources, item, tiles, t, head, LAYOUT, c)
        ring.wait_empty(n)
        column = item.v_slice * c.BLOCK_DV
        gather(rows, exists, column, c.HEAD_DIM_V, True, True, ring.slot(n), LAYOUT)
        async_copy.mbarrier_arrive(ring.filled(n), increment_count=False)
    else:
        load_values(sources.v, new_tokens(item), tiles.new_hi - 1 - t, head, item.v_slice, ring, n, ARRIVALS, c)


@gluon.jit
def await_tile(sources, prefix, item, tiles, t, head, epoch, c):
    """Until the rows of tile t were gathered, if that is one of the prefix's tiles."""
    if (t >= tiles.new_tiles) & (t < tiles.end):
        tile = tiles.pool_hi - 1 - (t - tiles.new_tiles)
        await_unit(sources.ready, epoch, word_of(item.sequence, prefix.start, tile, head, c))


@gluon.jit
def produce(sources, call, memory, ARRIVALS: gl.constexpr, c):
    """K of tile t + 1 goes before V of tile t: that is the order in which consumers ask for them. Slots are looked up
    a tile ahead, one a thread, and go round through shared memory; the next item is found while consumers have the
    first tiles of this one."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    FROM_POOL: gl.constexpr = c.HAS_POOL and not c.GATHERED
    n = 0
    number = 0
    total, item, kv_start = announce_first(memory.board, call, c)
    epoch = epoch_of(sources.ready) if c.BESIDE else 0
    while item.extend_len != 0:
        tiles = tiles_of(item, call, c)
        head = item.head_block * c.HEADS // c.GROUP
        kv_indices = sources.kv_indices + kv_start
        new = new_tokens(item)
        prefix = Stretch(kv_start.to(gl.int32), item.prefix_len)
        if FROM_POOL:
            ahead = slots_of(kv_indices, item, tiles, tiles.begin, LANES, c)
        if c.QUERIES > 1:
            load_query(sources.q, item, memory, number, c)
        for t in range(tiles.begin, tiles.end + 1):
            keys_at = key_place(n, t, tiles, c)
            values_at = value_place(n - 1, t - 1, tiles, c)
            if FROM_POOL:
                memory.slots.index(n & 1).store(ahead * 2)
                ahead = slots_of(kv_indices, item, tiles, t + 1, LANES, c)
            if t < tiles.end:
                if (not c.UNIFIED) and t < tiles.new_tiles:
                    load_keys(sources.k, new, tiles.new_hi - 1 - t, head, memory.k_ring, keys_at, ARRIVALS, c)
                elif c.GATHERED:
                    tile = tiles.pool_hi - 1 - (t - tiles.new_tiles)
                    load_keys(sources.k_prefix, prefix, tile, head, memory.k_ring, keys_at, ARRIVALS, c)
                elif c.HAS_POOL:
                    gather_keys(sources, head, memory.slots.index(n & 1), memory.k_ring, keys_at, LAYOUT, c)
            if t == tiles.begin:
                if c.QUERIES == 1:
                    load_query(sources.q, item, memory, number, c)
            elif (not c.UNIFIED) and t <= tiles.new_tiles:
                new_values(sources, item, tiles, t - 1, head, memory.v_ring, values_at, ARRIVALS, call, c)
            elif c.GATHERED:
                tile = tiles.pool_hi - (t - tiles.new_tiles)
                load_values(sources.v_prefix, prefix, tile, head, item.v_slice, memory.v_ring, values_at, ARRIVALS, c)
            elif c.HAS_POOL:
                gather_values(
                    sources, item, tiles, t - 1, head, memory.slots.index((n - 1) & 1), memory.v_ring, values_at,
                    LAYOUT, call, c,
                )  # fmt: skip
            if c.BESIDE:  # while consumers are at the tiles before
                await_tile(sources, prefix, item, tiles, t + 1, head, epoch, c)
            if t == search_at(tiles):
                announce(memory.board, number + 1, total, call, c)
            n += 1
        n -= 1
        number += 1
        item, kv_start = announced(memory.board, number, c)
    if c.BESIDE:
        leave(sources.ready, epoch)
