"""Key and value rows from global memory into a ring: gathered through ``kv_indices``, or a sequence's own new rows.

Rows that no query may see are neither read nor left as they were: asynchronous copies fill them with zeros, so that
nothing stale meets a weight of zero.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .gluon_compat import gather_load
from .packed_work import key_index, key_positions, tile_keys
from .shares import next_work


@gluon.jit
def slots_of(call, work, shape, i, LAYOUT: gl.constexpr):
    """Pool slots of tile ``i``'s keys; 0 where there is none."""
    start, _ = tile_keys(work, shape, i)
    place = start + gl.arange(0, shape.BLOCK_N, layout=LAYOUT)
    slots = call.kv_indices + work.kv_start + (work.pool_lo + place)
    return gl.load(slots, mask=(i < work.last) & (place < work.pool_keys), other=0).to(gl.int32)


@gluon.jit
def exists_of(call, work, shape, i, LAYOUT: gl.constexpr):
    """(place in the key list, is there a key that some row sees) of tile ``i``'s keys."""
    start, end = tile_keys(work, shape, i)
    place = start + gl.arange(0, shape.BLOCK_N, layout=LAYOUT)
    exists = place < end
    if shape.MASK_PREFIX:
        exists = _seen(call, work, shape, place, exists)
    elif shape.MASK:
        if start + shape.BLOCK_N > work.prefix_len - work.pool_lo:  # the mask hides none of the prefix
            exists = _seen(call, work, shape, place, exists)
    return place, exists


@gluon.jit
def _seen(call, work, shape, place, exists):
    """``exists`` without the keys that the custom mask and the window hide from every row of the tile."""
    index = key_index(work, shape, place)
    masked = exists
    if not shape.MASK_PREFIX:
        masked = exists & (index >= work.prefix_len)
    seen = gl.zeros_like(index)
    position = key_positions(call, work, shape, index, masked)
    for token in range(work.token_first, work.token_last + 1):
        byte = gl.load(call.custom_mask + work.mask_row + token * work.mask_stride + index, mask=masked, other=0)
        hit = byte != 0
        if shape.WINDOW:
            row_position = work.offset + work.prefix_len + token
            if shape.Q_POSITIONS:
                row_position = gl.load(call.q_positions + work.q_start + token)
            hit = hit & (row_position <= position + call.window)
        seen = seen | hit.to(gl.int32)
    return exists & ((seen != 0) | (masked == 0))


@gluon.jit
def copy_rows(slot, pool, new, pool_offset, new_offset, is_new, exists, shape, COLUMN: gl.constexpr,
              DIM: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """Enqueues copies of a tile's rows, columns from COLUMN on, into ``slot``; columns from DIM on become zeros."""
    columns = COLUMN + gl.arange(0, slot.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    if shape.UNIFIED:
        rows = pool + pool_offset
    elif not shape.HAS_POOL:
        rows = new + new_offset
    else:
        rows = gl.where(is_new, new + new_offset, pool + pool_offset)
    pointers = gl.max_contiguous(gl.multiple_of(rows[:, None] + columns[None, :], [1, 16]), [1, 8])
    gather_load(slot, pointers, mask=exists[:, None] & (columns < DIM)[None, :])


@gluon.jit
def produce(call, shape, share, ring, pe, pairs, num_splits, WARPS: gl.constexpr):
    """The producer's partition: K and V tiles in turn, slots of the pool looked up two tiles ahead."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    STEP: gl.constexpr = 1 if shape.V_IS_K else 2
    n = 0
    cursor, sequence, base = share.cursor, share.sequence, share.base
    while cursor < share.end:
        work, begun, cursor, sequence, base = next_work(call, shape, share, cursor, sequence, base, pairs, num_splits)
        head = work.kv_head.to(gl.int64)
        k_pool = call.k_pool + head * call.stride_kg
        v_pool = call.v_pool + head * call.stride_vg
        k_new = call.k_new + head * call.stride_kh
        v_new = call.v_new + head * call.stride_vh
        slot = gl.zeros([shape.BLOCK_N], gl.int32, ROWS)
        ahead = slot
        if shape.HAS_POOL:
            slot = slots_of(call, work, shape, work.first, ROWS)
            ahead = slots_of(call, work, shape, work.first + 1, ROWS)
        for i in range(work.first, work.last):
            later = ahead
            if shape.HAS_POOL:
                later = slots_of(call, work, shape, i + 2, ROWS)
            place, exists = exists_of(call, work, shape, i, ROWS)
            is_new = place >= work.pool_keys
            pool_row = slot.to(gl.int64)
            new_row = work.q_start + (work.new_lo + place - work.pool_keys)
            ring.wait_empty(n)
            copy_rows(
                ring.slot(n), k_pool, k_new, pool_row * call.stride_ks, new_row * call.stride_kt, is_new, exists, shape,
                0, shape.HEAD_DIM, LAYOUT,
            )  # fmt: skip
            if shape.BLOCK_PE > 0:
                copy_rows(
                    pe.index(n // STEP % pe.shape[0]), k_pool, k_new, pool_row * call.stride_ks,
                    new_row * call.stride_kt, is_new, exists, shape, shape.BLOCK_D, shape.HEAD_DIM, LAYOUT,
                )  # fmt: skip
            async_copy.mbarrier_arrive(ring.filled(n), increment_count=False)
            n += 1
            if not shape.V_IS_K:
                ring.wait_empty(n)
                copy_rows(
                    ring.slot(n), v_pool, v_new, pool_row * call.stride_vs, new_row * call.stride_vt, is_new, exists,
                    shape, 0, shape.HEAD_DIM_V, LAYOUT,
                )  # fmt: skip
                async_copy.mbarrier_arrive(ring.filled(n), increment_count=False)
                n += 1
            slot = ahead
            ahead = later
