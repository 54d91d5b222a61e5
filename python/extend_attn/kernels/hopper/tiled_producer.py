"""The tiled Hopper kernel's producer: query tiles, then key and value tiles in the order that consumers use them.

New tokens come through TMA. Their descriptors are *ragged*: two leading dimensions whose strides cancel (modulo 2^64)
move the end of the tensor to the end of the sequence, so that the hardware fills the rows past it with zeros and a
neighbour's rows are never seen. Prefix rows, and all rows of a unified call, are gathered one by one into the same
rings, by asynchronous copies or, from an fp8 pool, through registers; rows past either end of what the item sees repeat
a row that it does see, and their scores are masked.
"""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .fp8_rows import load_codes, put_codes
from .gluon_compat import gather_load, struct, tma_load
from .tiled_masks import some_row_sees
from .tiled_schedule import count_blocks, find_item, item_index, publish
from .tiled_work import ROWS, box_at, key_place, tiles_of, value_place


@struct
class Sources:
    """Where rows come from: ragged descriptors of q, k and v, the pools [slots, heads, dim] and the slots' numbers; v
    once more, for rows that a mask may hide."""

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




@gluon.jit
def load_box(desc, item, row, head, column, barrier, destination, bytes: gl.constexpr, arrivals: gl.constexpr):
    """Rows ``row``.. of the item's sequence, zeros past its end. ``arrivals``: what completes the barrier."""
    if arrivals > 1:
        mbarrier.arrive(barrier, count=arrivals - 1)
    mbarrier.expect(barrier, bytes)
    tma_load(desc, box_at(item, row, head, column), barrier, destination)


@gluon.jit
def load_query(desc, item, memory, number, c):
    BYTES: gl.constexpr = ROWS * c.K_COLUMNS * c.K_CHUNKS * 2
    for who in gl.static_range(2):
        query = number % c.QUERIES * 2 + who
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
def load_keys(desc, item, tile, head, ring, n, arrivals: gl.constexpr, c):
    BYTES: gl.constexpr = c.BLOCK_N * c.K_COLUMNS * 2
    for chunk in gl.static_range(c.K_CHUNKS):
        at = n * c.K_CHUNKS + chunk
        ring.wait_empty(at)
        load_box(
            desc, item, tile * c.BLOCK_N, head, chunk * c.K_COLUMNS, ring.filled(at), ring.slot(at), BYTES, arrivals
        )


@gluon.jit
def load_values(desc, item, tile, head, ring, n, arrivals: gl.constexpr, c):
    BYTES: gl.constexpr = c.BLOCK_N * c.BLOCK_DV * 2
    ring.wait_empty(n)
    column = item.v_slice * c.BLOCK_DV
    load_box(desc, item, tile * c.BLOCK_N, head, column, ring.filled(n), ring.slot(n), BYTES, arrivals)


@gluon.jit
def gather(
    rows, exists, column, limit: gl.constexpr, columns: gl.constexpr, PADDED: gl.constexpr, HIDDEN: gl.constexpr,
    barrier, destination, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Columns [column, column + columns) of the rows at pointers ``rows``; zeros from ``limit`` on, if PADDED, and for
    rows that do not exist, if HIDDEN."""
    offset = column + gl.arange(0, columns, layout=gl.SliceLayout(0, LAYOUT))
    pointers = rows[:, None] + offset[None, :]
    pointers = gl.max_contiguous(gl.multiple_of(pointers, [1, 16]), [1, 8])
    if HIDDEN:
        gather_load(destination, pointers, mask=exists[:, None] & (offset < limit)[None, :])
    elif PADDED:
        gather_load(destination, pointers, mask=(offset < limit)[None, :])
    else:
        gather_load(destination, pointers)
    async_copy.mbarrier_arrive(barrier, increment_count=False)


@gluon.jit
def convert(rows, exists, COLUMN: gl.constexpr, limit: gl.constexpr, columns: gl.constexpr, ring, n,
            LAYOUT: gl.constexpr, c):  # fmt: skip
    """``gather`` of an fp8 pool's rows, by pointers to words of four codes; these wait in registers for the slot."""
    codes = load_codes(rows, exists, COLUMN, columns, limit, LAYOUT)
    ring.wait_empty(n)
    put_codes(ring.slot(n), codes, 0, c.FP8, ring.slots.dtype == gl.float16)
    fence_async_shared()
    mbarrier.arrive(ring.filled(n), count=gl.num_warps() * 32)


@gluon.jit
def rows_of(base, slots, stride, c):
    """Pointers to the rows of ``slots``; of an fp8 pool, to words of four codes."""
    if c.FP8:
        return base.to(gl.pointer_type(gl.int32), bitcast=True) + slots.to(gl.int64) * (stride // 4)
    else:
        return base + slots.to(gl.int64) * stride


@gluon.jit
def gather_keys(base, slots, stride, ring, n, LAYOUT: gl.constexpr, c):
    PADDED: gl.constexpr = c.HEAD_DIM != c.K_COLUMNS * c.K_CHUNKS
    rows = rows_of(base, slots, stride, c)
    for chunk in gl.static_range(c.K_CHUNKS):
        at = n * c.K_CHUNKS + chunk
        if c.FP8:
            convert(rows, slots >= 0, chunk * c.K_COLUMNS, c.HEAD_DIM, c.K_COLUMNS, ring, at, LAYOUT, c)
        else:
            ring.wait_empty(at)
            gather(
                rows, slots, chunk * c.K_COLUMNS, c.HEAD_DIM, c.K_COLUMNS, PADDED, False, ring.filled(at),
                ring.slot(at), LAYOUT,
            )  # fmt: skip


@gluon.jit
def gather_values(base, slots, exists, stride, v_slice, ring, n, LAYOUT: gl.constexpr, c):
    PADDED: gl.constexpr = c.HEAD_DIM_V != c.BLOCK_DV * c.V_SLICES
    rows = rows_of(base, slots, stride, c)
    if c.FP8:
        rows += v_slice * (c.BLOCK_DV // 4)
        convert(rows, exists, 0, c.HEAD_DIM_V, c.BLOCK_DV, ring, n, LAYOUT, c)
    else:
        ring.wait_empty(n)
        gather(
            rows, exists, v_slice * c.BLOCK_DV, c.HEAD_DIM_V, c.BLOCK_DV, PADDED, c.MASK_PREFIX, ring.filled(n),
            ring.slot(n), LAYOUT,
        )  # fmt: skip


@gluon.jit
def gather_new_values(sources, item, tiles, t, head, ring, n, call, c):
    """New tile t's values, without those that a mask hides from all rows of the item."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    exists = some_row_sees(t, tiles, item, call, LAYOUT, c)
    row = (tiles.new_hi - 1 - t) * c.BLOCK_N + gl.arange(0, c.BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
    rows = sources.v_new + head.to(gl.int64) * sources.stride_vh
    rows += (item.q_start + row).to(gl.int64) * sources.stride_vt
    ring.wait_empty(n)
    gather(
        rows, exists, item.v_slice * c.BLOCK_DV, c.HEAD_DIM_V, c.BLOCK_DV, True, True, ring.filled(n), ring.slot(n),
        LAYOUT,
    )  # fmt: skip


@gluon.jit
def slots_of(kv_indices, item, tiles, t, LAYOUT: gl.constexpr, c):
    """Pool slots of prefix tile t's keys; keys that the item does not see repeat one that it does."""
    start = (tiles.pool_hi - 1 - (t - tiles.new_tiles)) * c.BLOCK_N
    key = start + gl.arange(0, c.BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
    key = gl.maximum(gl.minimum(key, item.prefix_len - 1), tiles.pool_first)
    return gl.load(kv_indices + key).to(gl.int32)  # half the registers


@gluon.jit
def new_slots_of(kv_indices, item, tiles, t, LAYOUT: gl.constexpr, c):
    """Pool slots of new tile t's keys in a unified call; past the end, the last one's."""
    key = (tiles.new_hi - 1 - t) * c.BLOCK_N + gl.arange(0, c.BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
    return gl.load(kv_indices + item.prefix_len + gl.minimum(key, item.extend_len - 1)).to(gl.int32)


@gluon.jit
def produce(sources, call, memory, ARRIVALS: gl.constexpr, c):
    """K of tile t + 1 goes before V of tile t: that is the order in which consumers ask for them."""
    # a thread's share of a row: 8 elements of 16 bits, or 8 codes in two words
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2 if c.FP8 else 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    total = count_blocks(call, c)
    n = 0
    number = 0
    turn = 0
    working = total * 0 + 1
    while working != 0:
        item, rest, kv_start = find_item(item_index(turn, total, call, c), total, call, c)
        publish(memory.board, item, rest, turn)
        turn += 1
        working = item.extend_len
        if working != 0:
            tiles = tiles_of(item, call, c)
            if tiles.begin < tiles.end:
                head = item.head_block * c.HEADS // c.GROUP
                k_base = sources.k_pool + head.to(gl.int64) * sources.stride_kg
                v_base = sources.v_pool + head.to(gl.int64) * sources.stride_vg
                slots = gl.zeros([c.BLOCK_N], gl.int32, gl.SliceLayout(1, LAYOUT))
                following = slots
                if c.QUERIES > 1:
                    load_query(sources.q, item, memory, number, c)
                for t in range(tiles.begin, tiles.end + 1):
                    keys_at = key_place(n, t, tiles, c)
                    values_at = value_place(n - 1, t - 1, tiles, c)
                    if t < tiles.end:
                        if (not c.UNIFIED) and t < tiles.new_tiles:
                            tile = tiles.new_hi - 1 - t
                            load_keys(sources.k, item, tile, head, memory.k_ring, keys_at, ARRIVALS, c)
                        elif c.HAS_POOL:
                            if c.UNIFIED and t < tiles.new_tiles:
                                following = new_slots_of(sources.kv_indices + kv_start, item, tiles, t, LAYOUT, c)
                            else:
                                following = slots_of(sources.kv_indices + kv_start, item, tiles, t, LAYOUT, c)
                            gather_keys(k_base, following, sources.stride_ks, memory.k_ring, keys_at, LAYOUT, c)
                    if t == tiles.begin:
                        if c.QUERIES == 1:
                            load_query(sources.q, item, memory, number, c)
                    elif c.MASK and (not c.UNIFIED) and t <= tiles.new_tiles:
                        gather_new_values(sources, item, tiles, t - 1, head, memory.v_ring, values_at, call, c)
                    elif (not c.UNIFIED) and t <= tiles.new_tiles:
                        load_values(sources.v, item, tiles.new_hi - t, head, memory.v_ring, values_at, ARRIVALS, c)
                    elif c.HAS_POOL:
                        exists = slots >= 0
                        if c.MASK_PREFIX:
                            exists = some_row_sees(t - 1, tiles, item, call, LAYOUT, c)
                        gather_values(
                            v_base, slots, exists, sources.stride_vs, item.v_slice, memory.v_ring, values_at, LAYOUT, c
                        )  # fmt: skip
                    slots = following
                    n += 1
                n -= 1
                number += 1
