"""The packed Hopper kernel's producers for fp8 pools, where shared memory holds tiles of codes beside the ring."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .fp8_rows import produce_new
from .fp8_staged import convert, copy_layout, stage
from .gather import exists_of, slots_of
from .shares import next_work


@gluon.jit
def _slots(call, work, shape, i, LAYOUT: gl.constexpr):
    """gather.slots_of, without a look at each key where the pool has all of the tile."""
    slots = gl.zeros([shape.BLOCK_N], gl.int32, LAYOUT)
    if (i + 1) * shape.BLOCK_N <= work.pool_keys:
        first = call.kv_indices + (work.kv_start + (work.pool_lo + i * shape.BLOCK_N))
        slots = gl.load(first + gl.arange(0, shape.BLOCK_N, layout=LAYOUT)).to(gl.int32)
    else:
        slots = slots_of(call, work, shape, i, LAYOUT)
    return slots


@gluon.jit
def _stage(call, work, shape, i, stop, pool, stride, slots, place, DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """Copies of tile ``i``, if it is one of the pool's, into its place."""
    if i < stop:
        if not shape.MASK and (i + 1) * shape.BLOCK_N <= work.pool_keys:
            stage(place, pool, slots, stride, slots, DIM, False, LAYOUT)
        else:
            _, exists = exists_of(call, work, shape, i, gl.SliceLayout(1, LAYOUT))
            stage(place, pool, slots, stride, exists, DIM, True, LAYOUT)
    async_copy.commit_group()


@gluon.jit
def produce_staged(call, shape, share, ring, pe, codes, pairs, num_splits, V: gl.constexpr, WARPS: gl.constexpr):
    """One producer's partition: the K tiles (V False) or the V tiles of the ring. All places for codes but one are
    on their way while a tile is converted; slots of the pool are looked up a tile before."""
    STEP: gl.constexpr = 1 if shape.V_IS_K else 2
    PE: gl.constexpr = 0 if V else shape.BLOCK_PE
    DIM: gl.constexpr = shape.HEAD_DIM_V if V else shape.HEAD_DIM
    HALF: gl.constexpr = (shape.V_HALF and V) or call.q.dtype.element_ty == gl.float16
    AHEAD: gl.constexpr = shape.CODE_TILES - 1
    FIRST: gl.constexpr = shape.CODE_TILES if V else 0  # place
    LAYOUT: gl.constexpr = copy_layout(shape.BLOCK_N, codes.shape[2], WARPS)
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    n = gl.to_tensor(1 if V else 0)
    cursor, sequence, base = share.cursor, share.sequence, share.base
    while cursor < share.end:
        work, begun, cursor, sequence, base = next_work(call, shape, share, cursor, sequence, base, pairs, num_splits)
        head = work.kv_head.to(gl.int64)
        if V:
            pool = call.v_pool + head * call.stride_vg
            stride = call.stride_vs
        else:
            pool = call.k_pool + head * call.stride_kg
            stride = call.stride_ks
        stop = gl.minimum(work.pool_tiles, work.last)
        if work.first < stop:
            for i in gl.static_range(AHEAD):
                slots = _slots(call, work, shape, work.first + i, ROWS)
                place = codes.index(FIRST + i)
                _stage(call, work, shape, work.first + i, stop, pool, stride, slots, place, DIM, LAYOUT)
            ahead = _slots(call, work, shape, work.first + AHEAD, ROWS)
            for i in range(work.first, stop):
                later = _slots(call, work, shape, i + AHEAD + 1, ROWS)
                place = codes.index(FIRST + (i + AHEAD - work.first) % shape.CODE_TILES)
                _stage(call, work, shape, i + AHEAD, stop, pool, stride, ahead, place, DIM, LAYOUT)
                ring.wait_empty(n)
                async_copy.wait_group(AHEAD)
                here = codes.index(FIRST + (i - work.first) % shape.CODE_TILES)
                convert(here, ring.slot(n), 0, shape.FP8, HALF)
                if PE > 0:
                    rest = pe.index(n // STEP % pe.shape[0])
                    convert(here, rest, shape.BLOCK_D, shape.FP8, HALF)
                ring.hand_over(n, 1)
                n += STEP
                ahead = later
        n = produce_new(call, work, shape, ring, pe, n, V, WARPS)
