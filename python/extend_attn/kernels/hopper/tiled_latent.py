"""Latent attention (absorbed MLA) in the tiled Hopper family: values are the first columns of their keys.

The two consumers share 64 query rows. Each makes the scores of half of a tile's keys, and owns half of the value
columns; they tell each other their rows' maxima and, through shared memory, their weights. So a tile is cut both ways:
into two parts of its keys, each two halves of the value columns and the rest of the columns behind them. It is read
once, and a slot is free when its part's scores and its half's products are made. (New tokens' values may lie elsewhere,
as after a concatenation of keys; they are then read too.) Beside the queries there is room for two tiles, so a
consumer's scores wait for its products.
"""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..compat import gdc_wait
from .gluon_compat import reinterpret, sync, tma_load
from .tiled_epilogue import finish_part, store
from .tiled_gather import arrived, gather, load_runs, no_slots, rows_of, runs_of
from .tiled_masks import BOTH, NEW, first_key, sees, some_row_sees
from .tiled_producer import new_rows
from .tiled_schedule import announce, announce_first, announced, receive, search_at
from .tiled_softmax import logits, scales, temperature_of
from .tiled_work import ROWS, Item, box_at, place_of, tiles_of

HALVES = gl.constexpr(2)  # of the value columns, one a consumer
PARTS = gl.constexpr(2)  # of a tile's keys, one a consumer
BOX = gl.constexpr(64)  # columns of a TMA box: as wide as the swizzle
MAXIMA, WEIGHTS, SUMS = gl.constexpr(0), gl.constexpr(2), gl.constexpr(4)  # barriers of what consumers tell each other


@gluon.jit
def scores(WHO: gl.constexpr, memory, n, rest, c):
    """Issues S = Q K^T of this consumer's keys of the tile whose halves are pair ``n`` and whose rest is ``rest``."""
    acc = gl.zeros([ROWS, c.BLOCK_N // PARTS], gl.float32, c.S)
    for half in gl.static_range(HALVES):
        at = (n * HALVES + half) * PARTS + WHO
        memory.k_ring.wait_full(at)
        if c.GATHERS:
            fence_async_shared()
        keys = memory.k_ring.slot(at).permute((1, 0))
        acc = warpgroup_mma(memory.q_slots.index(half), keys, acc, use_acc=half > 0, is_async=True)
    at = rest * PARTS + WHO
    memory.v_ring.wait_full(at)
    if c.GATHERS:
        fence_async_shared()
    return warpgroup_mma(memory.q_rest.index(0), memory.v_ring.slot(at).permute((1, 0)), acc, is_async=True)


@gluon.jit
def sees_part(WHO: gl.constexpr, t, tiles, item, call, KEYS: gl.constexpr, c):
    """[ROWS, half a tile]: which of this consumer's keys of tile t the rows see."""
    start, limit = first_key(t, tiles, item, KEYS, c)
    start += WHO * (c.BLOCK_N // PARTS)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, c.S))
    column = gl.arange(0, c.BLOCK_N // PARTS, layout=gl.SliceLayout(0, c.S))
    return sees((column < limit - start)[None, :], item.first, row, start, column, item, call, c)


@gluon.jit
def tell(memory, WHAT: gl.constexpr, WHO: gl.constexpr):
    """The other consumer may read what this one has written."""
    sync()
    mbarrier.arrive(memory.told.index(WHAT + WHO), count=1)


@gluon.jit
def hear(memory, WHAT: gl.constexpr, WHO: gl.constexpr, time):
    """Waits for what the other consumer tells for the ``time``-th time."""
    mbarrier.wait(memory.told.index(WHAT + 1 - WHO), time & 1)


@gluon.jit
def attend_latent(WHO: gl.constexpr, memory, call, item, tiles, n, rest, c):
    """(accumulator of this consumer's columns, maxima, sums of its keys) over the item, and where the next tile lies.

    The first lies in pair ``n`` and slot ``rest``. Where new values lie APART, a new tile's follow in a pair of their
    own.
    """
    KEYS: gl.constexpr = BOTH if c.HAS_POOL else NEW
    OTHER: gl.constexpr = 1 - WHO
    place = place_of(item, tiles, item.first, call, c)
    temperature = temperature_of(call, item, item.first, c)
    o = gl.zeros([ROWS, c.BLOCK_DV], gl.float32, c.O)
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, c.S))
    l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, c.S))
    for t in range(tiles.begin, tiles.end):
        s_acc = scores(WHO, memory, n, rest, c)
        scale, v_scale = scales(t, tiles, call, KEYS, c)
        if c.MASK:
            visible = sees_part(WHO, t, tiles, item, call, KEYS, c)
        s = warpgroup_mma_wait(0, [s_acc])
        memory.v_ring.release(rest * PARTS + WHO)
        for half in gl.static_range(HALVES):
            memory.k_ring.release((n * HALVES + half) * PARTS + WHO)
        if c.APART and t < tiles.new_tiles:  # what keys without values, and values without keys, are not read for
            memory.k_ring.release((n * HALVES + WHO) * PARTS + WHO)
            memory.k_ring.wait_full((n * HALVES + WHO) * PARTS + OTHER)
            memory.k_ring.release((n * HALVES + WHO) * PARTS + OTHER)
            n += 1
            memory.k_ring.wait_full((n * HALVES + OTHER) * PARTS + WHO)
            memory.k_ring.release((n * HALVES + OTHER) * PARTS + WHO)
            memory.k_ring.wait_full((n * HALVES + WHO) * PARTS + WHO)
            memory.k_ring.release((n * HALVES + WHO) * PARTS + WHO)
        s = logits(s, scale, temperature, call, True, c)
        if c.MASK:
            s = gl.where(visible, s, float("-inf"))
        else:
            whole = (t > place.begin) & (t < place.stop_new) | ((t >= place.start_pool) & (t < place.stop_pool))
            if not whole:
                s = gl.where(sees_part(WHO, t, tiles, item, call, KEYS, c), s, float("-inf"))
        highest = gl.max(s, 1)
        memory.maxima.index(WHO).store(highest)
        tell(memory, MAXIMA, WHO)
        hear(memory, MAXIMA, WHO, rest)
        m_new = gl.maximum(m, gl.maximum(highest, memory.maxima.index(OTHER).load(gl.SliceLayout(1, c.S))))
        finite = m_new
        if c.UNSEEN:
            finite = gl.where(m_new == float("-inf"), 0.0, m_new)
        w = gl.exp2(s - finite[:, None])
        alpha = gl.exp2(m - finite)
        m = m_new
        l = l * alpha + gl.sum(w, 1)
        if c.V_SCALED:
            w = w * v_scale
        w = w.to(memory.q_slots.dtype)
        memory.weights.index(WHO).store(w)
        fence_async_shared()
        tell(memory, WEIGHTS, WHO)
        p = gl.convert_layout(w, c.P)
        o = o * gl.convert_layout(alpha, gl.SliceLayout(1, c.O))[:, None]
        at = (n * HALVES + WHO) * PARTS
        if c.APART:
            memory.k_ring.wait_full(at + WHO)
        memory.k_ring.wait_full(at + OTHER)
        if c.GATHERS:
            fence_async_shared()
        o_acc = warpgroup_mma(p, memory.k_ring.slot(at + WHO), o, is_async=True)
        hear(memory, WEIGHTS, WHO, rest)
        o_acc = warpgroup_mma(memory.weights.index(OTHER), memory.k_ring.slot(at + OTHER), o_acc, is_async=True)
        o, used = warpgroup_mma_wait(0, [o_acc, p])
        memory.k_ring.release(at)
        memory.k_ring.release(at + 1)
        n += 1
        rest += 1
    return o, m, l, n, rest


@gluon.jit
def consume_latent(WHO: gl.constexpr, call, memory, c):
    """A consumer's partition: items as they come."""
    if c.PDL:
        gdc_wait()
    n = 0  # pairs of halves so far
    rest = 0  # key tiles so far
    number = 0  # items so far
    item = receive(memory.board, number, c)
    while item.extend_len != 0:
        tiles = tiles_of(item, call, c)
        mbarrier.wait(memory.q_full.index(0), number & 1)
        o, m, l, n, rest = attend_latent(WHO, memory, call, item, tiles, n, rest, c)
        memory.sums.index(WHO).store(l)
        tell(memory, SUMS, WHO)
        hear(memory, SUMS, WHO, number)
        l += memory.sums.index(1 - WHO).load(gl.SliceLayout(1, c.S))
        who = gl.where(item.extend_len > 0, WHO, 0)  # from a constant Triton 3.6 can't lower the stores of parts
        half = Item(
            item.sequence, item.block, item.first, item.q_start, item.extend_len, item.prefix_len, item.head_block,
            who, item.part,
        )  # fmt: skip
        if c.SPLIT:
            finish_part(call, half, item.first, item.head_block, o, m, l, c)
        else:
            store(WHO, memory, call, half, item.first, item.head_block, o, m, l, c)
            if c.STAGED:  # the place of the queries, which both consumers have read
                tma.store_wait(0)
        mbarrier.arrive(memory.q_empty.index(WHO), count=1)
        number += 1
        item = receive(memory.board, number, c)


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
    PADDED: gl.constexpr = DIM < HALVES * c.K_COLUMNS + BOX
    ring.wait_empty(n)
    gather(rows, exists, COLUMN, DIM, PADDED, c.MASK, ring.slot(n), LAYOUT)
    async_copy.mbarrier_arrive(ring.filled(n), increment_count=False)


@gluon.jit
def parts_of(rows, LAYOUT: gl.constexpr):
    """What belongs to each part's keys of what belongs to a tile's."""
    SLICE: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    first, second = gl.split(gl.permute(gl.reshape(rows, [PARTS, rows.shape[0] // PARTS]), (1, 0)))
    return gl.convert_layout(first, SLICE), gl.convert_layout(second, SLICE)


@gluon.jit
def copy_part(rows, exists, memory, n, rest, PART: gl.constexpr, LAYOUT: gl.constexpr, c):
    """A part's keys, at pointers ``rows``."""
    for half in gl.static_range(HALVES):
        at = (n * HALVES + half) * PARTS + PART
        copy_slot(rows, exists, half * c.K_COLUMNS, c.HEAD_DIM, memory.k_ring, at, LAYOUT, c)
    copy_slot(rows, exists, HALVES * c.K_COLUMNS, c.HEAD_DIM, memory.v_ring, rest * PARTS + PART, LAYOUT, c)


@gluon.jit
def gather_tile(sources, item, tiles, t, head, slots, kv_indices, memory, n, rest, LAYOUT: gl.constexpr, call, c):
    """Tile t row by row: from ``slots`` of the pool, or new rows that a mask may hide; runs of slots through TMA."""
    if c.RUNS and (not c.MASK_PREFIX) and t >= tiles.new_tiles and slots.strays == 0:
        SIZE: gl.constexpr = c.BLOCK_N // PARTS
        for part in gl.static_range(PARTS):
            start = slots.start + part * SIZE
            for half in gl.static_range(HALVES):
                at = (n * HALVES + half) * PARTS + part
                memory.k_ring.wait_empty(at)
                load_runs(
                    sources.k_runs, kv_indices, start, head, half * c.K_COLUMNS, memory.k_ring.filled(at),
                    memory.k_ring.slot(at),
                )  # fmt: skip
            at = rest * PARTS + part
            memory.v_ring.wait_empty(at)
            load_runs(
                sources.k_runs, kv_indices, start, head, HALVES * c.K_COLUMNS, memory.v_ring.filled(at),
                memory.v_ring.slot(at),
            )  # fmt: skip
    else:
        rows = rows_of(sources.k_pool + head.to(gl.int64) * sources.stride_kg, slots.slots, sources.stride_ks, LAYOUT)
        if c.MASK and (not c.UNIFIED) and t < tiles.new_tiles:
            rows = new_rows(sources, item, tiles, t, head, LAYOUT, c)  # keys begin where their values do
        first, second = parts_of(rows, LAYOUT)
        first_exists = first
        second_exists = second
        if c.MASK:
            first_exists, second_exists = parts_of(some_row_sees(t, tiles, item, call, LAYOUT, c), LAYOUT)
        copy_part(first, first_exists, memory, n, rest, 0, LAYOUT, c)
        copy_part(second, second_exists, memory, n, rest, 1, LAYOUT, c)


@gluon.jit
def load_tile(desc, item, tiles, t, head, COLUMN: gl.constexpr, ring, n, ARRIVALS: gl.constexpr, c):
    """A slot's columns from COLUMN on of both parts of new tile t, through TMA."""
    for part in gl.static_range(PARTS):
        row = (tiles.new_hi - 1 - t) * c.BLOCK_N + part * (c.BLOCK_N // PARTS)
        load_slot(desc, item, row, head, COLUMN, ring, n * PARTS + part, ARRIVALS)


@gluon.jit
def load_apart(sources, item, tiles, t, head, memory, n, ARRIVALS: gl.constexpr, LAYOUT: gl.constexpr, call, c):
    """New tile t's values, which are not in its keys."""
    if c.MASK:
        first, second = parts_of(new_rows(sources, item, tiles, t, head, LAYOUT, c), LAYOUT)
        first_exists, second_exists = parts_of(some_row_sees(t, tiles, item, call, LAYOUT, c), LAYOUT)
    for half in gl.static_range(HALVES):
        at = n * HALVES + half
        if c.MASK:
            at *= PARTS
            copy_slot(first, first_exists, half * c.K_COLUMNS, c.HEAD_DIM_V, memory.k_ring, at, LAYOUT, c)
            copy_slot(second, second_exists, half * c.K_COLUMNS, c.HEAD_DIM_V, memory.k_ring, at + 1, LAYOUT, c)
        else:
            load_tile(sources.v, item, tiles, t, head, half * c.K_COLUMNS, memory.k_ring, at, ARRIVALS, c)


@gluon.jit
def produce_latent(sources, call, memory, ARRIVALS: gl.constexpr, c):
    """Key tiles in the order of the walk; slots and items are looked up ahead as in ``produce`` (tiled_producer.py)."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    n = 0
    rest = 0
    number = 0
    total, item, kv_start = announce_first(memory.board, call, c)
    while item.extend_len != 0:
        tiles = tiles_of(item, call, c)
        load_queries(sources.q, item, memory, number, c)
        head = item.head_block // c.GROUP
        kv_indices = sources.kv_indices + kv_start
        slots = no_slots(c)
        if c.HAS_POOL:
            ahead = runs_of(kv_indices, item, tiles, tiles.begin, c)
        for t in range(tiles.begin, tiles.end + 1):
            if c.HAS_POOL:
                slots = arrived(kv_indices, ahead, c)
                ahead = runs_of(kv_indices, item, tiles, t + 1, c)
            if t < tiles.end:
                if (not c.UNIFIED) and (c.APART or not c.MASK) and t < tiles.new_tiles:
                    for half in gl.static_range(HALVES):
                        at = n * HALVES + half
                        load_tile(sources.k, item, tiles, t, head, half * c.K_COLUMNS, memory.k_ring, at, ARRIVALS, c)
                    load_tile(
                        sources.k, item, tiles, t, head, HALVES * c.K_COLUMNS, memory.v_ring, rest, ARRIVALS, c
                    )  # fmt: skip
                    if c.APART:
                        n += 1
                        load_apart(sources, item, tiles, t, head, memory, n, ARRIVALS, LAYOUT, call, c)
                elif c.GATHERS:
                    gather_tile(sources, item, tiles, t, head, slots, kv_indices, memory, n, rest, LAYOUT, call, c)
                n += 1
                rest += 1
            if t == search_at(tiles):
                announce(memory.board, number + 1, total, call, c)
        number += 1
        item, kv_start = announced(memory.board, number, c)
