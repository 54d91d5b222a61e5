"""A consumer's result: output rows and their LSE, of all keys or of the parts of splits."""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from .gluon_compat import barrier, constexpr_function, reinterpret, tma_store
from .merge import HANDED_OVER, arrive, count_in, hand_over, merge_slice, slices_of, wait_for
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
        NUMBER: gl.constexpr = 2 * c.QUERIES * TILES
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


@gluon.jit
def finish_part(call, item, row0, head, o, m, l, c):
    """The end of an item's part: its accumulator, maxima and sums go to where the others' are, and this consumer merges
    its share of the result (merge.py). Places are those of tiles of 64 tokens of one head and slice of values."""
    BLOCKS: gl.constexpr = c.TOKENS // ROWS
    block = item.block * BLOCKS + (row0 - item.first) // ROWS
    tile = (item.sequence * call.row_blocks * BLOCKS + block) * c.NUM_HEADS + head
    tile = tile * c.V_SLICES + item.v_slice
    first = tile.to(gl.int64) * call.splits
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, c.S))
    own = call.partial_ml + (first + item.part.number) * (2 * ROWS) + r
    gl.store(own, m)
    gl.store(own + ROWS, l)
    if item.part.parts == 2:
        _finish_pair(call, item, first, call.arrivals + tile, row0, head, o, m, l, c)
    else:
        _finish_one_of_many(call, item, first, call.arrivals + tile, row0, head, o, c)


@gluon.jit
def _finish_pair(call, item, first, word, row0, head, o, m, l, c):
    """Of two parts each consumer keeps one half of the columns and sends the other, so that half as much is written
    and read: prefill_chat {PAIR_GAIN}."""
    second = item.part.number
    left, right = _halves(o, c)
    kept = gl.where(second == 0, left, right)
    sent = gl.where(second == 0, right, left)
    HALF: gl.constexpr = left.type.layout
    COLUMNS: gl.constexpr = c.BLOCK_DV // 2
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, HALF))
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, HALF))
    real = (row0 + r < item.extend_len)[:, None] & (column >= 0)[None, :]
    place = r[:, None] * COLUMNS + column[None, :]  # halves of a part lie one after the other
    own = call.partial + (first + second) * (ROWS * c.BLOCK_DV) + place
    gl.store(own + (1 - second) * (ROWS * COLUMNS), sent, mask=real)
    before, epoch, arrived = count_in(word, 2)
    all_of_it = (arrived == 2) & ((before & HANDED_OVER) != 0)
    if arrived < 2:
        arrived = wait_for(word, epoch, arrived, 2, item.part.patience)
        if arrived < 2:
            gl.store(own + second * (ROWS * COLUMNS), kept, mask=real)
            barrier()
            arrived = hand_over(word, epoch, 2)
    if arrived >= 2:
        barrier()
        other = call.partial_ml + (first + 1 - second) * (2 * ROWS) + r
        m_other = gl.load(other, cache_modifier=".cg")
        l_other = gl.load(other + ROWS, cache_modifier=".cg")
        m_own = gl.convert_layout(m, gl.SliceLayout(1, HALF))
        l_own = gl.convert_layout(l, gl.SliceLayout(1, HALF))
        theirs = call.partial + (first + 1 - second) * (ROWS * c.BLOCK_DV) + place
        x = gl.load(theirs + second * (ROWS * COLUMNS), mask=real, other=0.0, cache_modifier=".cg")
        _store_half(call, item, row0, head, second, kept, m_own, l_own, x, m_other, l_other, r, c)
        if all_of_it:
            x = gl.load(theirs + (1 - second) * (ROWS * COLUMNS), mask=real, other=0.0, cache_modifier=".cg")
            _store_half(call, item, row0, head, 1 - second, sent, m_own, l_own, x, m_other, l_other, r, c)


@gluon.jit
def _halves(o, c):
    """The halves of an accumulator's columns. Of 16 columns a lane holds 2 and 2; here they lie side by side, so that
    they are stored and loaded together: pieces of a sector cost 10 us."""
    GROUPS: gl.constexpr = c.BLOCK_DV // 32
    LAYOUT: gl.constexpr = _half_layout(GROUPS * 16)
    o = o.reshape([ROWS, 2, GROUPS, 2, 4, 2]).permute((0, 2, 4, 3, 5, 1))
    left, right = o.reshape([ROWS, GROUPS * 16, 2]).split()
    return gl.convert_layout(left, LAYOUT), gl.convert_layout(right, LAYOUT)


@constexpr_function
def _half_layout(columns):
    """What each lane has of those anyway, 4 elements side by side first."""
    registers = [[0, 1], [0, 2], [8, 0]] + [[0, 1 << i] for i in range(4, columns.bit_length() - 1)]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [ROWS.value, columns])


@gluon.jit
def _store_half(call, item, row0, head, half, x, m, l, y, m_other, l_other, r, c):
    """Columns of one half, ``x`` of this part and ``y`` of the other, in the parts' order."""
    second = item.part.number
    m_0 = gl.where(second == 0, m, m_other)
    m_1 = gl.where(second == 0, m_other, m)
    top = gl.maximum(m_0, m_1)
    finite = gl.where(top == float("-inf"), 0.0, top)
    weight_0 = gl.exp2(m_0 - finite)
    weight_1 = gl.exp2(m_1 - finite)
    total = weight_0 * gl.where(second == 0, l, l_other) + weight_1 * gl.where(second == 0, l_other, l)
    if c.SINKS:
        alpha, top, total = add_sink(top, total, gl.load(call.sinks + head).to(gl.float32))
        weight_0 *= alpha
        weight_1 *= alpha
    token = row0 + r
    if c.LSE:
        if (item.v_slice == 0) & (half == 0):
            store_lse(call, item, token, head, top, total, c)
    scale = 1.0 / gl.where(total == 0.0, 1.0, total)
    weight_0 = (weight_0 * scale)[:, None]
    weight_1 = (weight_1 * scale)[:, None]
    out = gl.where(second == 0, x, y) * weight_0 + gl.where(second == 0, y, x) * weight_1
    GROUPS: gl.constexpr = c.BLOCK_DV // 32
    out = out.to(call.o.dtype.element_ty).reshape([ROWS, GROUPS, 4, 2, 2]).permute((0, 1, 3, 2, 4))
    out = out.reshape([ROWS, GROUPS * 16])
    if c.V_SLICES == 1:
        out = gl.convert_layout(out, output_layout(GROUPS * 16))
    OUT: gl.constexpr = out.type.layout
    token = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    column = gl.arange(0, GROUPS * 16, layout=gl.SliceLayout(0, OUT))
    column += item.v_slice * c.BLOCK_DV + half * (GROUPS * 16)
    _store_rows(call, item, token, head, column, out, c)


PARTS, ELEMENTS = gl.constexpr(4), gl.constexpr(2048)  # of a slice, read at once: 64 loads a thread in flight


@gluon.jit
def _finish_one_of_many(call, item, first, word, row0, head, o, c):
    """The whole part is written, and a share of the rows read of all."""
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, c.O))
    column = gl.arange(0, c.BLOCK_DV, layout=gl.SliceLayout(0, c.O))
    pointers = call.partial + ((first + item.part.number) * ROWS + r)[:, None] * c.BLOCK_DV + column[None, :]
    gl.store(pointers, o, mask=(row0 + r < item.extend_len)[:, None] & (column >= 0)[None, :])
    begin, step = arrive(word, item.part.number, item.part.parts, item.part.patience, False)
    if step > 0:
        rows = gl.minimum(item.extend_len - row0, ROWS)
        for s in range(begin, slices_of(rows, ROWS, c.BLOCK_DV, ELEMENTS), step):
            x, m, l, rows_read, columns = merge_slice(
                call.partial, call.partial_ml, first, item.part.parts, 0, rows, s, False, 1, ROWS, c.BLOCK_DV, PARTS,
                ELEMENTS,
            )  # fmt: skip
            if c.SINKS:
                alpha, m, l = add_sink(m, l, gl.load(call.sinks + head).to(gl.float32))
                x = x * alpha[:, None]
            token = row0 + rows_read
            if c.LSE:
                if item.v_slice == 0:
                    store_lse(call, item, token, head, m, l, c)
            x = x * (1.0 / gl.where(l == 0.0, 1.0, l))[:, None]
            _store_rows(call, item, token, head, item.v_slice * c.BLOCK_DV + columns, x, c)
