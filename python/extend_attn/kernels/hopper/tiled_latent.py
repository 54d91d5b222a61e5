"""Latent attention (absorbed MLA) in the tiled Hopper family: values are the first columns of their keys.

A key tile is read once, into two halves of its value columns and a slot of the columns behind them. (New tokens'
values may lie elsewhere, as after a concatenation of keys; they are then read too.) The two consumers share 64 query
rows: each makes all scores and owns one half of the values, which it keeps until its products are done. Beside the
queries there is room for two tiles, so a consumer's scores wait for its products, and the tensor cores turn to the
other consumer meanwhile.
"""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_compat import gather_load, reinterpret, tma_load
from .tiled_epilogue import store, store_part
from .tiled_masks import ALL, BOTH, NEW, SOME, hide, seen, some_row_sees
from .tiled_producer import arrived, load_runs, new_rows, no_slots, rows_of, slots_of
from .tiled_schedule import announce, announced, count_blocks, receive, search_at
from .tiled_softmax import logits, no_sums, rescale, row_sums, scales, temperature_of, weigh
from .tiled_work import ROWS, Item, box_at, place_of, tiles_of

HALVES = gl.constexpr(2)  # of the value columns, one a consumer
BOX = gl.constexpr(64)  # columns of a TMA box: as wide as the swizzle


@gluon.jit
def scores(memory, n, rest, c):
    """Issues S = Q K^T of the tile whose halves are pair ``n`` and whose last columns are slot ``rest``."""
    acc = gl.zeros([ROWS, c.BLOCK_N], gl.float32, c.S)
    for half in gl.static_range(HALVES):
        at = n * HALVES + half
        memory.k_ring.wait_full(at)
        if c.GATHERS:
            fence_async_shared()
        keys = memory.k_ring.slot(at).permute((1, 0))
        acc = warpgroup_mma(memory.q_slots.index(half), keys, acc, use_acc=half > 0, is_async=True)
    memory.v_ring.wait_full(rest)
    if c.GATHERS:
        fence_async_shared()
    return warpgroup_mma(memory.q_rest.index(0), memory.v_ring.slot(rest).permute((1, 0)), acc, is_async=True)


@gluon.jit
def attend_latent(WHO: gl.constexpr, memory, call, item, tiles, n, rest, c):
    """(accumulator of this consumer's columns, maxima, sums) over the item's key tiles, and where the next tile lies.

    The first lies in pair ``n`` and slot ``rest``. Where new values lie APART, a new tile's follow in a pair of their
    own.
    """
    KEYS: gl.constexpr = BOTH if c.HAS_POOL else NEW
    EDGES: gl.constexpr = ALL if c.MASK else SOME
    place = place_of(item, tiles, item.first, call, c)
    temperature = temperature_of(call, item, item.first, c)
    o = gl.zeros([ROWS, c.BLOCK_DV], gl.float32, c.O)
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, c.S))
    l = no_sums(c)
    for t in range(tiles.begin, tiles.end):
        s_acc = scores(memory, n, rest, c)
        scale, v_scale = scales(t, tiles, call, KEYS, c)
        if EDGES == ALL:
            visible = seen(t, tiles, place, item, call, KEYS, c)
        s = warpgroup_mma_wait(0, [s_acc])
        memory.v_ring.release(rest)
        memory.k_ring.release(n * HALVES + 1 - WHO)
        if c.APART and t < tiles.new_tiles:
            memory.k_ring.release(n * HALVES + WHO)
            n += 1
            memory.k_ring.wait_full(n * HALVES + 1 - WHO)
            memory.k_ring.release(n * HALVES + 1 - WHO)
        s = logits(s, scale, temperature, call, True, c)
        if EDGES == ALL:
            s = gl.where(visible, s, float("-inf"))
        else:
            s = hide(s, t, tiles, place, item, call, KEYS, c)
        w, alpha, m, l = weigh(s, m, l, scale, True, c)
        if c.V_SCALED:
            w = w * v_scale
        p = gl.convert_layout(w.to(memory.q_slots.dtype), c.P)
        o = rescale(o, alpha, c.O)
        if c.APART and t < tiles.new_tiles:
            memory.k_ring.wait_full(n * HALVES + WHO)
            if c.GATHERS:
                fence_async_shared()
        o_acc = warpgroup_mma(p, memory.k_ring.slot(n * HALVES + WHO), o, is_async=True)
        o, used = warpgroup_mma_wait(0, [o_acc, p])
        memory.k_ring.release(n * HALVES + WHO)
        n += 1
        rest += 1
    return o, m, row_sums(l, c), n, rest


@gluon.jit
def consume_latent(WHO: gl.constexpr, call, memory, c):
    """A consumer's partition: items as they come."""
    n = 0  # pairs of halves so far
    rest = 0  # key tiles so far
    number = 0  # items with keys so far
    turn = 0
    item = receive(memory.board, turn, call, c)
    while item.extend_len != 0:
        tiles = tiles_of(item, call, c)
        o = gl.zeros([ROWS, c.BLOCK_DV], gl.float32, c.O)
        m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, c.S))
        l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, c.S))
        if (not c.SPLIT) or tiles.begin < tiles.end:
            mbarrier.wait(memory.q_full.index(0), number & 1)
            o, m, l, n, rest = attend_latent(WHO, memory, call, item, tiles, n, rest, c)
            mbarrier.arrive(memory.q_empty.index(WHO), count=1)
            number += 1
        who = gl.where(item.extend_len > 0, WHO, 0)  # from a constant Triton 3.6 can't lower the stores of parts
        half = Item(
            item.sequence, item.block, item.first, item.q_start, item.extend_len, item.prefix_len, item.head_block,
            who, item.split,
        )  # fmt: skip
        if c.SPLIT:
            store_part(call, half, tiles, item.first, item.head_block, o, l, m, l, c)
        else:
            store(WHO, memory, call, half, item.first, item.head_block, o, l, m, l, c)
        turn += 1
        item = receive(memory.board, turn, call, c)


@gluon.jit
def load_boxes(desc, item, row, head, COLUMN: gl.constexpr, barrier, destination):
    """Rows ``row``.. of the item's sequence, zeros past its end, as boxes of 64 columns side by side."""
    NUMBER: gl.constexpr = destination.shape[1] // BOX
    boxes = reinterpret(destination, destination.dtype, [NUMBER, destination.shape[0], BOX], destination.layout)
    for box in gl.static_range(NUMBER):
        tma_load(desc, box_at(item, row, head, COLUMN + box * BOX), barrier, boxes.index(box))


@gluon.jit
def load_queries(desc, item, memory, number, c):
    for who in gl.static_range(2):
        mbarrier.wait(memory.q_empty.index(who), (number & 1) ^ 1)
    full = memory.q_full.index(0)
    mbarrier.expect(full, ROWS * (HALVES * c.K_COLUMNS + BOX) * 2)
    for half in gl.static_range(HALVES):
        load_boxes(desc, item, item.first, item.head_block, half * c.K_COLUMNS, full, memory.q_slots.index(half))
    load_boxes(desc, item, item.first, item.head_block, HALVES * c.K_COLUMNS, full, memory.q_rest.index(0))


@gluon.jit
def load_slot(desc, item, row, head, COLUMN: gl.constexpr, ring, n, ARRIVALS: gl.constexpr):
    ring.wait_empty(n)
    if ARRIVALS > 1:
        mbarrier.arrive(ring.filled(n), count=ARRIVALS - 1)
    mbarrier.expect(ring.filled(n), ring.slots.shape[1] * ring.slots.shape[2] * 2)
    load_boxes(desc, item, row, head, COLUMN, ring.filled(n), ring.slot(n))


@gluon.jit
def copy_slot(rows, exists, COLUMN: gl.constexpr, DIM: gl.constexpr, ring, n, LAYOUT: gl.constexpr, c):
    """Columns from COLUMN on of DIM at pointers ``rows``; zeros for rows that do not exist."""
    columns = COLUMN + gl.arange(0, ring.slots.shape[2], layout=gl.SliceLayout(0, LAYOUT))
    pointers = gl.max_contiguous(gl.multiple_of(rows[:, None] + columns[None, :], [1, 16]), [1, 8])
    ring.wait_empty(n)
    if c.MASK or DIM < HALVES * c.K_COLUMNS + BOX:
        gather_load(ring.slot(n), pointers, mask=exists[:, None] & (columns < DIM)[None, :])
    else:
        gather_load(ring.slot(n), pointers)
    async_copy.mbarrier_arrive(ring.filled(n), increment_count=False)


@gluon.jit
def gather_tile(sources, item, tiles, t, head, slots, kv_indices, memory, n, rest, LAYOUT: gl.constexpr, call, c):
    """Tile t row by row: from ``slots`` of the pool, or new rows that a mask may hide; runs of slots through TMA."""
    if c.RUNS and (not c.MASK_PREFIX) and t >= tiles.new_tiles and slots.strays == 0:
        for half in gl.static_range(HALVES):
            at = n * HALVES + half
            memory.k_ring.wait_empty(at)
            load_runs(
                sources.k_runs, kv_indices, slots, head, half * c.K_COLUMNS, memory.k_ring.filled(at),
                memory.k_ring.slot(at), c,
            )  # fmt: skip
        memory.v_ring.wait_empty(rest)
        load_runs(
            sources.k_runs, kv_indices, slots, head, HALVES * c.K_COLUMNS, memory.v_ring.filled(rest),
            memory.v_ring.slot(rest), c,
        )  # fmt: skip
    else:
        rows = rows_of(sources.k_pool + head.to(gl.int64) * sources.stride_kg, slots, sources.stride_ks, LAYOUT)
        if c.MASK and (not c.UNIFIED) and t < tiles.new_tiles:
            rows = new_rows(sources, item, tiles, t, head, LAYOUT, c)  # keys begin where their values do
        exists = gl.full([c.BLOCK_N], 1, gl.int1, gl.SliceLayout(1, LAYOUT))
        if c.MASK:
            exists = some_row_sees(t, tiles, item, call, LAYOUT, c)
        for half in gl.static_range(HALVES):
            at = n * HALVES + half
            copy_slot(rows, exists, half * c.K_COLUMNS, c.HEAD_DIM, memory.k_ring, at, LAYOUT, c)
        copy_slot(rows, exists, HALVES * c.K_COLUMNS, c.HEAD_DIM, memory.v_ring, rest, LAYOUT, c)


@gluon.jit
def load_tile(sources, item, tiles, t, head, memory, n, rest, ARRIVALS: gl.constexpr, c):
    """New tile t's keys through TMA."""
    row = (tiles.new_hi - 1 - t) * c.BLOCK_N
    for half in gl.static_range(HALVES):
        load_slot(sources.k, item, row, head, half * c.K_COLUMNS, memory.k_ring, n * HALVES + half, ARRIVALS)
    load_slot(sources.k, item, row, head, HALVES * c.K_COLUMNS, memory.v_ring, rest, ARRIVALS)


@gluon.jit
def load_apart(sources, item, tiles, t, head, memory, n, ARRIVALS: gl.constexpr, LAYOUT: gl.constexpr, call, c):
    """New tile t's values, which are not in its keys."""
    if c.MASK:
        rows = new_rows(sources, item, tiles, t, head, LAYOUT, c)
        exists = some_row_sees(t, tiles, item, call, LAYOUT, c)
    for half in gl.static_range(HALVES):
        at = n * HALVES + half
        if c.MASK:
            copy_slot(rows, exists, half * c.K_COLUMNS, c.HEAD_DIM_V, memory.k_ring, at, LAYOUT, c)
        else:
            row = (tiles.new_hi - 1 - t) * c.BLOCK_N
            load_slot(sources.v, item, row, head, half * c.K_COLUMNS, memory.k_ring, at, ARRIVALS)


@gluon.jit
def produce_latent(sources, call, memory, ARRIVALS: gl.constexpr, c):
    """Key tiles in the order of the walk; slots and items are looked up ahead as in ``produce`` (tiled_producer.py)."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    total = count_blocks(call, c)
    n = 0
    rest = 0
    number = 0
    turn = 0
    announce(memory.board, turn, total, call, c)
    item, kv_start = announced(memory.board, turn, call, c)
    while item.extend_len != 0:
        tiles = tiles_of(item, call, c)
        works = tiles.begin < tiles.end
        if works:
            load_queries(sources.q, item, memory, number, c)
        head = item.head_block // c.GROUP
        kv_indices = sources.kv_indices + kv_start
        slots = no_slots(c)
        if c.HAS_POOL:
            ahead = slots_of(kv_indices, item, tiles, tiles.begin, c)
        for t in range(tiles.begin, tiles.end + 1):
            if c.HAS_POOL:
                slots = arrived(kv_indices, ahead, c)
                ahead = slots_of(kv_indices, item, tiles, t + 1, c)
            if t < tiles.end:
                if (not c.UNIFIED) and (c.APART or not c.MASK) and t < tiles.new_tiles:
                    load_tile(sources, item, tiles, t, head, memory, n, rest, ARRIVALS, c)
                    if c.APART:
                        n += 1
                        load_apart(sources, item, tiles, t, head, memory, n, ARRIVALS, LAYOUT, call, c)
                elif c.GATHERS:
                    gather_tile(sources, item, tiles, t, head, slots, kv_indices, memory, n, rest, LAYOUT, call, c)
                n += 1
                rest += 1
            if t == search_at(tiles):
                announce(memory.board, turn + 1, total, call, c)
        number += works.to(gl.int32)
        turn += 1
        item, kv_start = announced(memory.board, turn, call, c)
