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
from .gluon_compat import constexpr_function, gather_load, reinterpret, struct, tma_load
from .tiled_masks import some_row_sees
from .tiled_schedule import announce, announced, count_blocks, search_at
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
    k_runs: tma.tensor_descriptor


RUN = gl.constexpr(64)  # consecutive slots that are worth TMA (latent keys alone: elsewhere copies are as fast)
PANEL = gl.constexpr(64)  # columns of a swizzled panel


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


@struct
class Slots:
    """Pool slots of a tile's keys, for each row that a thread copies. ``start``: where they are in the item's key list.
    ``strays``: 0 if TMA can load the tile."""

    slots: gl.tensor
    strays: gl.tensor
    start: gl.tensor


@constexpr_function
def slots_layout(warps):
    return gl.SliceLayout(1, gl.BlockedLayout([1, 8], [4, 8], [warps, 1], [1, 0]))


@constexpr_function
def all_keys_layout(keys, warps):
    """Every warp holds all keys."""
    registers = [[32 << i] for i in range((keys // 32).bit_length() - 1)]
    lanes = [[1 << i] for i in range(5)]
    return gl.DistributedLinearLayout(registers, lanes, [[0]] * (warps.bit_length() - 1), [], [keys])


@gluon.jit
def no_slots(c):
    return Slots(gl.zeros([c.BLOCK_N], gl.int32, slots_layout(gl.num_warps())), gl.to_tensor(0), gl.to_tensor(0))


@gluon.jit
def slots_of(kv_indices, item, tiles, t, c):
    """The Slots of tile t. Keys that the item does not see repeat one that it does; before the prefix's tiles and past
    their end they mean nothing, but are slots of the item."""
    start = (tiles.pool_hi - 1 - (t - tiles.new_tiles)) * c.BLOCK_N
    first = tiles.pool_first
    last = item.prefix_len - 1
    if c.UNIFIED:
        new = t < tiles.new_tiles
        start = gl.where(new, item.prefix_len + (tiles.new_hi - 1 - t) * c.BLOCK_N, start)
        last = gl.where(new, item.prefix_len + item.extend_len - 1, last)
    key = start + gl.arange(0, c.BLOCK_N, layout=slots_layout(gl.num_warps()))
    slots = gl.load(kv_indices + gl.maximum(gl.minimum(key, last), first), mask=key * 0 + last >= first, other=0)
    strays = gl.to_tensor(0)
    if c.RUNS:  # the ends of the first run alone: slots in no order then cost next to nothing
        inside = (start >= first) & (start + c.BLOCK_N - 1 <= last)
        begin = gl.load(kv_indices + start, mask=inside, other=0).to(gl.int32)
        strays = gl.load(kv_indices + start + (RUN - 1), mask=inside, other=0).to(gl.int32) - begin - (RUN - 1)
    return Slots(slots.to(gl.int32), strays, start)  # half the registers


@gluon.jit
def arrived(kv_indices, slots, c):
    """The slots, once they are needed; ``strays`` counts keys that do not follow the first of their RUN. Each warp
    looks at all keys, so that none waits for another."""
    strays = slots.strays
    if c.RUNS:
        if strays == 0:
            key = gl.arange(0, c.BLOCK_N, layout=all_keys_layout(c.BLOCK_N, gl.num_warps()))
            own = gl.load(kv_indices + slots.start + key).to(gl.int32)
            begin = gl.load(kv_indices + slots.start + key // RUN * RUN).to(gl.int32)
            strays = gl.sum((own - begin != key % RUN).to(gl.int32), 0)
    return Slots(slots.slots, strays, slots.start)


@gluon.jit
def load_runs(desc, kv_indices, start, head, column, barrier, destination):
    """Rows from key ``start`` on, at consecutive slots, by TMA, into a slot of the ring, which is panels of 64 columns,
    each all rows high."""
    COLUMNS: gl.constexpr = destination.shape[1]
    PANELS: gl.constexpr = COLUMNS // PANEL
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    mbarrier.arrive(barrier, count=gl.num_warps() * 32 - 1)
    BOX: gl.constexpr = desc.block_shape[0]  # rows
    BOXES: gl.constexpr = destination.shape[0] // BOX
    mbarrier.expect(barrier, destination.shape[0] * COLUMNS * 2)
    boxes = reinterpret(destination, destination.dtype, [PANELS * BOXES, BOX, PANEL], LAYOUT)
    for box in gl.static_range(BOXES):
        slot = gl.load(kv_indices + start + box * BOX).to(gl.int32)
        for panel in gl.static_range(PANELS):
            tma_load(desc, [slot, head, column + panel * PANEL], barrier, boxes.index(panel * BOXES + box))


@gluon.jit
def rows_of(base, slots, stride, LAYOUT: gl.constexpr):
    """Pointers to the rows of ``slots``."""
    return base + gl.convert_layout(slots.slots, gl.SliceLayout(1, LAYOUT)).to(gl.int64) * stride


@gluon.jit
def convert(
    rows, exists, COLUMN: gl.constexpr, limit: gl.constexpr, columns: gl.constexpr, ring, n, LAYOUT: gl.constexpr, c
):
    """``gather`` of an fp8 pool's rows, by pointers to words of four codes; these wait in registers for the slot."""
    codes = load_codes(rows, exists, COLUMN, columns, limit, LAYOUT)
    ring.wait_empty(n)
    put_codes(ring.slot(n), codes, 0, c.FP8, ring.slots.dtype == gl.float16, True)
    fence_async_shared()
    mbarrier.arrive(ring.filled(n), count=gl.num_warps() * 32)


@gluon.jit
def words_of(pool, head, slots, stride_head, stride, LAYOUT: gl.constexpr):
    """Pointers to the rows of ``slots`` in an fp8 pool, as words of four codes."""
    base = pool.to(gl.pointer_type(gl.int32), bitcast=True) + head.to(gl.int64) * (stride_head // 4)
    return rows_of(base, slots, stride // 4, LAYOUT)


@gluon.jit
def gather_keys(sources, head, slots, ring, n, LAYOUT: gl.constexpr, c):
    PADDED: gl.constexpr = c.HEAD_DIM != c.K_COLUMNS * c.K_CHUNKS
    if c.FP8:
        rows = words_of(sources.k_pool, head, slots, sources.stride_kg, sources.stride_ks, LAYOUT)
        exists = gl.full([c.BLOCK_N], 1, gl.int1, gl.SliceLayout(1, LAYOUT))
    else:
        rows = rows_of(sources.k_pool + head.to(gl.int64) * sources.stride_kg, slots, sources.stride_ks, LAYOUT)
    for chunk in gl.static_range(c.K_CHUNKS):
        at = n * c.K_CHUNKS + chunk
        column = chunk * c.K_COLUMNS
        if c.FP8:
            convert(rows, exists, chunk * c.K_COLUMNS, c.HEAD_DIM, c.K_COLUMNS, ring, at, LAYOUT, c)
        else:
            ring.wait_empty(at)
            gather(rows, rows, column, c.HEAD_DIM, c.K_COLUMNS, PADDED, False, ring.filled(at), ring.slot(at), LAYOUT)


@gluon.jit
def gather_values(sources, item, tiles, t, head, slots, ring, n, LAYOUT: gl.constexpr, call, c):
    """Tile t's values, which lie in ``slots`` of the pool."""
    PADDED: gl.constexpr = c.HEAD_DIM_V != c.BLOCK_DV * c.V_SLICES
    column = item.v_slice * c.BLOCK_DV
    if c.MASK_PREFIX:
        exists = some_row_sees(t, tiles, item, call, LAYOUT, c)
    elif c.FP8:
        exists = gl.full([c.BLOCK_N], 1, gl.int1, gl.SliceLayout(1, LAYOUT))
    else:
        exists = slots.slots
    if c.FP8:
        rows = words_of(sources.v_pool, head, slots, sources.stride_vg, sources.stride_vs, LAYOUT) + column // 4
        convert(rows, exists, 0, c.HEAD_DIM_V, c.BLOCK_DV, ring, n, LAYOUT, c)
    else:
        rows = rows_of(sources.v_pool + head.to(gl.int64) * sources.stride_vg, slots, sources.stride_vs, LAYOUT)
        ring.wait_empty(n)
        gather(
            rows, exists, column, c.HEAD_DIM_V, c.BLOCK_DV, PADDED, c.MASK_PREFIX, ring.filled(n), ring.slot(n), LAYOUT
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
        gather(
            rows, exists, column, c.HEAD_DIM_V, c.BLOCK_DV, True, True, ring.filled(n), ring.slot(n), LAYOUT
        )
    else:
        load_values(sources.v, item, tiles.new_hi - 1 - t, head, ring, n, ARRIVALS, c)


@gluon.jit
def produce(sources, call, memory, ARRIVALS: gl.constexpr, c):
    """K of tile t + 1 goes before V of tile t: that is the order in which consumers ask for them. Slots are looked up
    a tile ahead where registers hold them, the next item while consumers have the first tiles of this one."""
    # a thread's share of a row: 8 elements of 16 bits, or 8 codes in two words
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2 if c.FP8 else 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    # of 128 keys, or beside four slots a key, registers do not hold two tiles' slots
    AHEAD: gl.constexpr = c.HAS_POOL and c.BLOCK_N <= 64 and c.K_CHUNKS < 4
    total = count_blocks(call, c)
    n = 0
    number = 0
    turn = 0
    announce(memory.board, turn, total, call, c)
    item, kv_start = announced(memory.board, turn, call, c)
    while item.extend_len != 0:
        tiles = tiles_of(item, call, c)
        works = tiles.begin < tiles.end
        head = item.head_block * c.HEADS // c.GROUP
        kv_indices = sources.kv_indices + kv_start
        slots = no_slots(c)
        following = slots
        if AHEAD:
            ahead = slots_of(kv_indices, item, tiles, tiles.begin, c)
        if c.QUERIES > 1:
            if works:
                load_query(sources.q, item, memory, number, c)
        for t in range(tiles.begin, tiles.end + 1):
            keys_at = key_place(n, t, tiles, c)
            values_at = value_place(n - 1, t - 1, tiles, c)
            if c.HAS_POOL:
                if AHEAD:
                    following = ahead
                    ahead = slots_of(kv_indices, item, tiles, t + 1, c)
                else:
                    following = slots_of(kv_indices, item, tiles, t, c)
            if t < tiles.end:
                if (not c.UNIFIED) and t < tiles.new_tiles:
                    load_keys(sources.k, item, tiles.new_hi - 1 - t, head, memory.k_ring, keys_at, ARRIVALS, c)
                elif c.HAS_POOL:
                    gather_keys(sources, head, following, memory.k_ring, keys_at, LAYOUT, c)
            if t == tiles.begin:
                if c.QUERIES == 1:
                    if works:
                        load_query(sources.q, item, memory, number, c)
            elif (not c.UNIFIED) and t <= tiles.new_tiles:
                new_values(sources, item, tiles, t - 1, head, memory.v_ring, values_at, ARRIVALS, call, c)
            elif c.HAS_POOL:
                gather_values(
                    sources, item, tiles, t - 1, head, slots, memory.v_ring, values_at, LAYOUT, call, c
                )  # fmt: skip
            if t == search_at(tiles):
                announce(memory.board, turn + 1, total, call, c)
            slots = following
            n += 1
        n -= 1
        number += works.to(gl.int32)
        turn += 1
        item, kv_start = announced(memory.board, turn, call, c)
