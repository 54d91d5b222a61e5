"""Rows of the pool for the tiled Hopper kernel's producer: which slots a tile's keys lie in, and asynchronous copies of
them into a ring, or TMA where they follow one another."""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .addresses import rows_at
from .gluon_compat import constexpr_function, gather_load, reinterpret, struct, tma_load

RUN = gl.constexpr(64)  # consecutive slots that are worth TMA: latent keys alone, elsewhere looking costs more
PANEL = gl.constexpr(64)  # columns of a swizzled panel
# Rows of a piece of a tile of 128 keys. Copies of a whole tile at once hold up the consumers' shuffles, exponentials
# and products in the queue that they share: d128_extend_pref 563 us by 32 rows, 572 by 64, 593 by 16, 642 by 128.
PIECE = gl.constexpr(32)


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
def in_every_warp(size, warps):
    """A layout of ``size`` numbers of which every warp holds all."""
    registers = [[32 << i] for i in range((size // 32).bit_length() - 1)]
    lanes = [[1 << i] for i in range(5)]
    return gl.DistributedLinearLayout(registers, lanes, [[0]] * (warps.bit_length() - 1), [], [size])


@gluon.jit
def no_slots(c):
    return Slots(gl.zeros([c.BLOCK_N], gl.int32, slots_layout(gl.num_warps())), gl.to_tensor(0), gl.to_tensor(0))


@gluon.jit
def keys_of(item, tiles, t, c):
    """(place of tile t's first key in the item's key list, first and last place that the item sees there)."""
    start = (tiles.pool_hi - 1 - (t - tiles.new_tiles)) * c.BLOCK_N
    first = tiles.pool_first
    last = item.prefix_len - 1
    if c.UNIFIED:
        new = t < tiles.new_tiles
        start = gl.where(new, item.prefix_len + (tiles.new_hi - 1 - t) * c.BLOCK_N, start)
        last = gl.where(new, item.prefix_len + item.extend_len - 1, last)
    return start, first, last


@gluon.jit
def slots_of(kv_indices, item, tiles, t, LAYOUT: gl.constexpr, c):
    """Pool slots of tile t's keys. Those that the item does not see repeat one that it does; past the prefix's tiles
    they mean nothing, but are slots of the item, and before them they are not looked up."""
    start, first, last = keys_of(item, tiles, t, c)
    key = start + gl.arange(0, c.BLOCK_N, layout=LAYOUT)
    known = (last >= first) & ((t >= tiles.new_tiles) | c.UNIFIED)
    slots = gl.load(kv_indices + gl.maximum(gl.minimum(key, last), first), mask=(key * 0 == 0) & known, other=0)
    return slots.to(gl.int32)  # half the registers


@gluon.jit
def runs_of(kv_indices, item, tiles, t, c):
    """The Slots of tile t."""
    slots = slots_of(kv_indices, item, tiles, t, slots_layout(gl.num_warps()), c)
    start, first, last = keys_of(item, tiles, t, c)
    strays = gl.to_tensor(0)
    if c.RUNS:  # the ends of the first run alone: slots in no order then cost next to nothing
        inside = (start >= first) & (start + c.BLOCK_N - 1 <= last)
        begin = gl.load(kv_indices + start, mask=inside, other=0).to(gl.int32)
        strays = gl.load(kv_indices + start + (RUN - 1), mask=inside, other=0).to(gl.int32) - begin - (RUN - 1)
    return Slots(slots, strays, start)


@gluon.jit
def arrived(kv_indices, slots, c):
    """The slots, once they are needed; ``strays`` counts keys that do not follow the first of their RUN. Each warp
    looks at all keys, so that none waits for another."""
    strays = slots.strays
    if c.RUNS:
        if strays == 0:
            key = gl.arange(0, c.BLOCK_N, layout=in_every_warp(c.BLOCK_N, gl.num_warps()))
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
    return base + gl.convert_layout(slots, gl.SliceLayout(1, LAYOUT)).to(gl.int64) * stride


@gluon.jit
def gather(
    rows, exists, column, limit: gl.constexpr, PADDED: gl.constexpr, HIDDEN: gl.constexpr, destination,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Copies columns from ``column`` on, as many as the destination has, of the rows at pointers ``rows``; zeros from
    ``limit`` on, if PADDED, and for rows that do not exist, if HIDDEN."""
    offset = column + gl.arange(0, destination.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    pointers = gl.max_contiguous(gl.multiple_of(rows[:, None] + offset[None, :], [1, 16]), [1, 8])
    if HIDDEN:
        gather_load(destination, pointers, mask=exists[:, None] & (offset < limit)[None, :])
    elif PADDED:
        gather_load(destination, pointers, mask=(offset < limit)[None, :])
    else:
        gather_load(destination, pointers)


@constexpr_function
def piece_size(keys):
    """Rows that are copied at a time: tiles of 64 keys gain nothing by pieces."""
    return PIECE if keys > 64 else keys


@gluon.jit
def piece_of(base, stride, slots, NUMBER: gl.constexpr, LAYOUT: gl.constexpr):
    """Pointers to the rows of a piece of a tile, whose ``slots`` lie in shared memory, doubled."""
    SIZE: gl.constexpr = piece_size(slots.shape[0])
    return rows_at(base, slots.slice(NUMBER * SIZE, SIZE).load(gl.SliceLayout(1, LAYOUT)), stride)


@gluon.jit
def gather_slots(
    base, stride, slots, rows, column, limit: gl.constexpr, PADDED: gl.constexpr, destination, barrier,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """``gather`` of the rows of ``slots``; ``rows`` is the tile's first piece."""
    SIZE: gl.constexpr = piece_size(slots.shape[0])
    for piece in gl.static_range(slots.shape[0] // SIZE):
        if piece > 0:
            rows = piece_of(base, stride, slots, piece, LAYOUT)
        gather(rows, rows, column, limit, PADDED, False, destination.slice(piece * SIZE, SIZE), LAYOUT)
    async_copy.mbarrier_arrive(barrier, increment_count=False)
