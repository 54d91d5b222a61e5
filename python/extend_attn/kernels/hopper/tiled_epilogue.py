"""A consumer's result: output rows and their LSE, of all keys or of the parts of splits."""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from .gluon_compat import constexpr_function, reinterpret, tma_store
from .merge import arrive, merge_slice, slices_of
from .softmax import add_sink, natural_lse
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
        alpha, m, l = add_sink(m, l, gl.load(call.sinks + head).to(gl.float32))
        o = o * gl.convert_layout(alpha, gl.SliceLayout(1, c.O))[:, None]
    if c.LSE:
        if item.v_slice == 0:
            token = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, c.S))
            store_lse(call, item, token, head, m, l, c)
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
        _store_rows(call, item, token, head, column, out, c)


@gluon.jit
def _store_rows(call, item, token, head, column, out, c):
    base = call.o + head.to(gl.int64) * call.stride_oh
    pointers = base + ((item.q_start + token).to(gl.int64) * call.stride_ot)[:, None] + column[None, :]
    pointers = gl.max_contiguous(gl.multiple_of(pointers, [1, 16]), [1, 8])
    mask = (token < item.extend_len)[:, None] & (column < c.HEAD_DIM_V)[None, :]
    gl.store(pointers, out.to(call.o.dtype.element_ty), mask=mask)


@gluon.jit
def store_lse(call, item, token, head, m, l, c):
    at = (item.q_start + token).to(gl.int64) * c.NUM_HEADS + head
    gl.store(call.lse + at, natural_lse(m, l), mask=token < item.extend_len)


# (Parts read at once, elements of a slice): 64 loads a thread are in flight together
PAIR, SOME = gl.constexpr(2), gl.constexpr(4)
OF_PAIR, OF_SOME = gl.constexpr(4096), gl.constexpr(2048)


@gluon.jit
def finish_part(call, item, row0, head, o, m, l, c):
    """The end of an item's part: its accumulator, maxima and sums go to where the others' are, and this consumer merges
    its share of the result (merge.py). Places are those of tiles of 64 tokens of one head and slice of values."""
    BLOCKS: gl.constexpr = c.TOKENS // ROWS
    block = item.block * BLOCKS + (row0 - item.first) // ROWS
    tile = (item.sequence * call.row_blocks * BLOCKS + block) * c.NUM_HEADS + head
    tile = tile * c.V_SLICES + item.v_slice
    first = tile.to(gl.int64) * call.splits
    slot = first + item.part.number
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, c.S))
    gl.store(call.partial_ml + slot * (2 * ROWS) + r, m)
    gl.store(call.partial_ml + slot * (2 * ROWS) + ROWS + r, l)
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, c.O))
    column = gl.arange(0, c.BLOCK_DV, layout=gl.SliceLayout(0, c.O))
    pointers = call.partial + (slot * ROWS + r)[:, None] * c.BLOCK_DV + column[None, :]
    gl.store(pointers, o, mask=(row0 + r < item.extend_len)[:, None] & (column >= 0)[None, :])
    parts = item.part.parts
    begin, step = arrive(call.arrivals + tile, item.part.number, parts, call.patience, False)
    if step > 0:
        if parts <= PAIR:
            _merge(call, item, parts, first, row0, head, begin, step, PAIR, OF_PAIR, c)
        else:
            _merge(call, item, parts, first, row0, head, begin, step, SOME, OF_SOME, c)


@gluon.jit
def _merge(call, item, parts, first, row0, head, begin, step, PARTS: gl.constexpr, SIZE: gl.constexpr, c):
    """Slices ``begin``, ``begin + step``, ... of a tile: all parts' weighted sum, divided and stored."""
    rows = gl.minimum(item.extend_len - row0, ROWS)
    for s in range(begin, slices_of(rows, ROWS, c.BLOCK_DV, SIZE), step):
        o, m, l, r, columns = merge_slice(
            call.partial, call.partial_ml, first, parts, 0, rows, s, False, 1, ROWS, c.BLOCK_DV, PARTS, SIZE
        )
        if c.SINKS:
            alpha, m, l = add_sink(m, l, gl.load(call.sinks + head).to(gl.float32))
            o = o * alpha[:, None]
        token = row0 + r
        if c.LSE:
            if item.v_slice == 0:
                store_lse(call, item, token, head, m, l, c)
        o = o * (1.0 / gl.where(l == 0.0, 1.0, l))[:, None]
        _store_rows(call, item, token, head, item.v_slice * c.BLOCK_DV + columns, o, c)
