"""A consumer's result: output rows and their LSE, or a split's part of them."""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from ..softmax import LN2, LOG2E
from .gluon_compat import constexpr_function, reinterpret, tma_store
from .tiled_work import ROWS, box_at


@constexpr_function
def output_layout(columns):
    """An accumulator's rows with 8 neighbouring columns a thread, for 16-byte stores."""
    registers = [[0, 1], [0, 2], [0, 4], [8, 0]] + [[0, 1 << i] for i in range(5, columns.bit_length() - 1)]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns])


@gluon.jit
def store(query, memory, call, item, row0, head, o, m, l, c):
    """Sink, division, output and LSE. STAGED: TMA is on its way with the output from the place of query tile ``query``
    when this returns. Else it changes its layout for 16-byte stores, unless no shared memory is left to do that in."""
    if c.SINKS:
        sink = gl.load(call.sinks + head).to(gl.float32) * LOG2E
        m_new = gl.maximum(m, sink)
        finite = gl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = gl.exp2(m - finite)
        l = l * alpha + gl.exp2(sink - finite)
        o = o * gl.convert_layout(alpha, gl.SliceLayout(1, c.O))[:, None]
        m = m_new
    if c.LSE:
        if item.v_slice == 0:
            token = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, c.S))
            at = (item.q_start + token).to(gl.int64) * c.NUM_HEADS + head
            gl.store(call.lse + at, (m + gl.log2(l)) * LN2, mask=token < item.extend_len)
    if c.UNSEEN:  # 0 for a row that saw nothing; its LSE is -inf
        l = gl.where(l == 0.0, 1.0, l)
    o = o * gl.convert_layout(1.0 / l, gl.SliceLayout(1, c.O))[:, None]
    if c.STAGED:
        # output tiles in a query tile's place; that of LATENT's one query has the two consumers'
        TILES: gl.constexpr = 1 if c.LATENT else c.K_CHUNKS * c.K_COLUMNS // c.BLOCK_DV
        slots = memory.q_slots
        NUMBER: gl.constexpr = c.CONSUMERS * c.QUERIES * TILES
        places = reinterpret(slots, slots.dtype, [NUMBER, ROWS, c.BLOCK_DV], memory.v_ring.slots.layout)
        place = places.index(query * TILES)
        place.store(o.to(slots.dtype))
        fence_async_shared()
        tma_store(call.o_desc, box_at(item, row0, head, item.v_slice * c.BLOCK_DV), place)
    else:
        DIRECT: gl.constexpr = c.V_SLICES > 1
        OUT: gl.constexpr = c.O if DIRECT else output_layout(c.BLOCK_DV)
        out = gl.convert_layout(o.to(call.o.dtype.element_ty), OUT)
        token = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
        column = item.v_slice * c.BLOCK_DV + gl.arange(0, c.BLOCK_DV, layout=gl.SliceLayout(0, OUT))
        base = call.o + head.to(gl.int64) * call.stride_oh
        pointers = base + ((item.q_start + token).to(gl.int64) * call.stride_ot)[:, None] + column[None, :]
        pointers = gl.max_contiguous(gl.multiple_of(pointers, [1, 16]), [1, 8])
        gl.store(pointers, out, mask=(token < item.extend_len)[:, None] & (column < c.HEAD_DIM_V)[None, :])


@gluon.jit
def store_part(call, item, tiles, row0, head, o, m, l, c):
    """A split's accumulator, maxima, sums in tiles of 64 tokens of one head; a split without keys has a sum of 0."""
    BLOCKS: gl.constexpr = c.TOKENS // ROWS
    block = item.block * BLOCKS + (row0 - item.first) // ROWS
    tile = (item.sequence * call.row_blocks * BLOCKS + block) * c.NUM_HEADS + head
    slot = tile.to(gl.int64) * call.splits + item.split
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, c.S))
    if item.v_slice == 0:
        gl.store(call.partial_ml + slot * (2 * ROWS) + r, m)
        gl.store(call.partial_ml + slot * (2 * ROWS) + ROWS + r, l)
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, c.O))
    column = item.v_slice * c.BLOCK_DV + gl.arange(0, c.BLOCK_DV, layout=gl.SliceLayout(0, c.O))
    pointers = call.partial + (slot * ROWS + r)[:, None] * (c.BLOCK_DV * c.V_SLICES) + column[None, :]
    real = (row0 + r < item.extend_len) & (tiles.begin < tiles.end)
    gl.store(pointers, o, mask=real[:, None] & (column >= 0)[None, :])
