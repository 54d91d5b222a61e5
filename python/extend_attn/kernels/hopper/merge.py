"""The parts of a pair merged in the launch that made them, by the programs that made them.

Each program that has a part stores it and counts itself in. Programs of one wave then wait for one another and merge a
slice of the rows and columns each. Nobody waits for good: one that ran out of patience (a program may be kept from
starting by another stream's kernels) hands its slice over and leaves, and the last to arrive, who sees that in the
count it arrives at, merges everything. Where nobody waits (EVEN, more than one wave) the last to arrive always does.
Parts are added up in their order whoever does it, so repeats are bit-identical.

``arrivals`` has a word a pair: the epoch, the arrivals in it, and whether a slice was handed over. The last to arrive
begins the next epoch, so that words are never set back, and a launch of other programs or pairs finds them ready.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .epilogue import store_part, store_result, store_rows
from .gluon_compat import barrier, constexpr_function

HANDED_OVER = gl.constexpr(1)
ARRIVAL = gl.constexpr(2)
EPOCH = gl.constexpr(1 << 16)

# (Parts read at once, elements of a slice): all loads of a step are in flight together, 16 to 64 a
# thread. Few parts leave much to each program, many leave little.
FEW, SOME, MANY, MOST = gl.constexpr(4), gl.constexpr(8), gl.constexpr(16), gl.constexpr(64)
OF_FEW, OF_SOME, OF_MANY, OF_MOST = gl.constexpr(2048), gl.constexpr(512), gl.constexpr(128), gl.constexpr(64)


@gluon.jit
def finish_pair(call, work, shape, acc, m_i, l_i, place, pair, part, parts, patience):
    """The end of this program's share of ``pair``: part ``part`` of ``parts`` that programs side by side have of it."""
    if parts == 1:
        store_result(call, work, shape, acc, m_i, l_i, place)
    else:
        first = gl.program_id(0) - part
        slot = slot_of(first, part, consumer_of(shape, work), shape.EVEN, shape.CONSUMERS)
        store_part(call, work, shape, acc, m_i, l_i, slot)
        begin, step = arrive(call.arrivals + pair, part, parts, patience, shape.EVEN)
        if step > 0:
            rows = gl.minimum(work.extend_len * shape.GROUP - work.row_first, shape.ROWS)
            if shape.EVEN:  # half as many elements: registers also hold where the program goes on
                if parts <= FEW:
                    _merge(call, work, shape, first, parts, rows, begin, step, FEW, OF_FEW // 2)
                else:
                    _merge(call, work, shape, first, parts, rows, begin, step, SOME, OF_SOME)
            elif parts <= FEW:
                _merge(call, work, shape, first, parts, rows, begin, step, FEW, OF_FEW)
            elif rows * shape.BLOCK_D >= parts * OF_SOME:
                _merge(call, work, shape, first, parts, rows, begin, step, SOME, OF_SOME)
            elif parts <= MANY:
                _merge(call, work, shape, first, parts, rows, begin, step, MANY, OF_MANY)
            else:
                _merge(call, work, shape, first, parts, rows, begin, step, MOST, OF_MOST)


@gluon.jit
def arrive(word, part, parts, patience, EVEN: gl.constexpr):
    """Counts part ``part`` of ``parts`` in at ``word``, once this program has stored it: which slices of the result are
    its to merge, ``begin``, ``begin + step``, ...; none if ``step`` is 0."""
    barrier()
    before = gl.atomic_add(word, ARRIVAL, sem="acq_rel")
    epoch = before & -EPOCH
    arrived = (before - epoch) // ARRIVAL + 1
    begin, step = part, parts
    if arrived == parts:
        gl.atomic_xchg(word, epoch + EPOCH, sem="relaxed")
        all_of_it = (before & HANDED_OVER) != 0
        if EVEN:
            all_of_it = True
        begin = gl.where(all_of_it, 0, part)
        step = gl.where(all_of_it, 1, parts)
    elif not EVEN:
        tries = gl.to_tensor(0)
        while (arrived < parts) & (tries < patience):
            arrived = (gl.atomic_add(word, 0, sem="acquire") - epoch) // ARRIVAL
            tries += 1
        if arrived < parts:
            arrived = (gl.atomic_or(word, HANDED_OVER, sem="acq_rel") - epoch) // ARRIVAL
            if arrived >= parts:  # the last one came in between, and knew nothing of it
                gl.atomic_and(word, -1 - HANDED_OVER, sem="relaxed")
    if arrived >= parts:
        barrier()
    return begin, gl.where(arrived >= parts, step, 0)


@gluon.jit
def consumer_of(shape, work):
    """Which of its program's consumers has these rows."""
    return work.row_first // shape.ROWS % shape.CONSUMERS


@gluon.jit
def slot_of(first, part, consumer, EVEN: gl.constexpr, CONSUMERS: gl.constexpr):
    """Where the parts lie of programs from ``first`` on, of one of CONSUMERS in each. An EVEN program has room for a
    part of two pairs: of one that began before it, and of one that goes on behind it, of which it has part 0."""
    slot = first + part
    if EVEN:
        slot = 2 * slot + (part == 0).to(gl.int32)
    return (slot * CONSUMERS + consumer).to(gl.int64)


@constexpr_function
def _layout(PARTS, ROWS, COLUMNS, WARPS):
    """[parts, rows, columns] with up to 16 parts a thread: only more of them are summed across warps."""
    deep = max(1, PARTS // 16)
    left = WARPS // deep
    wide = max(1, min(4, ROWS * COLUMNS // (32 * left)))
    lanes = min(32, COLUMNS // wide)
    across = min(left, COLUMNS // (wide * lanes))
    return gl.BlockedLayout(
        [PARTS // deep, 1, wide], [1, 32 // lanes, lanes], [deep, left // across, across], [2, 1, 0]
    )  # fmt: skip


@gluon.jit
def _merge(call, work, shape, first, parts, rows, begin, step, PARTS: gl.constexpr, ELEMENTS: gl.constexpr):
    """Slices ``begin``, ``begin + step``, ... of the pair's ``rows``: all parts' weighted sum, divided and stored."""
    for s in range(begin, slices_of(rows, shape.ROWS, shape.BLOCK_D, ELEMENTS), step):
        merged, m_i, l_i, r, columns = merge_slice(
            call.partial, call.partial_ml, first, parts, consumer_of(shape, work), rows, s, shape.EVEN, shape.CONSUMERS,
            shape.ROWS, shape.BLOCK_D, PARTS, ELEMENTS,
        )  # fmt: skip
        store_rows(call, work, shape, merged, m_i, l_i, r, columns, s % (shape.BLOCK_D // columns.shape[0]) == 0)


@gluon.jit
def slices_of(rows, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, SIZE: gl.constexpr):
    """Slices of ``SIZE`` elements of a result [rows, BLOCK_D]."""
    COLUMNS: gl.constexpr = min(BLOCK_D, SIZE)
    return gl.cdiv(rows, min(BLOCK_M, SIZE // COLUMNS)) * (BLOCK_D // COLUMNS)


@gluon.jit
def merge_slice(
    partial, partial_ml, first, parts, consumer, rows, s, EVEN: gl.constexpr, CONSUMERS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, PARTS: gl.constexpr, SIZE: gl.constexpr,
):  # fmt: skip
    """(weighted sum [rows, columns], maxima, sums, which rows and columns they are) of slice ``s`` of all parts, PARTS
    read at once, which lie where ``slot_of`` says."""
    COLUMNS: gl.constexpr = min(BLOCK_D, SIZE)
    ROWS: gl.constexpr = min(BLOCK_M, SIZE // COLUMNS)
    ACROSS: gl.constexpr = BLOCK_D // COLUMNS
    CUBE: gl.constexpr = _layout(PARTS, ROWS, COLUMNS, 4)
    FLAT: gl.constexpr = gl.SliceLayout(0, CUBE)
    PARTS_BY_ROWS: gl.constexpr = gl.SliceLayout(2, CUBE)
    OF_PART: gl.constexpr = gl.SliceLayout(1, PARTS_BY_ROWS)
    OF_ROW: gl.constexpr = gl.SliceLayout(0, PARTS_BY_ROWS)
    OF_COLUMN: gl.constexpr = gl.SliceLayout(0, FLAT)
    TO_FLAT: gl.constexpr = gl.SliceLayout(1, FLAT)
    r = s // ACROSS * ROWS + gl.arange(0, ROWS, layout=OF_ROW)
    columns = s % ACROSS * COLUMNS + gl.arange(0, COLUMNS, layout=OF_COLUMN)
    merged = gl.zeros([ROWS, COLUMNS], gl.float32, FLAT)
    m_i = gl.full([ROWS], float("-inf"), gl.float32, OF_ROW)
    l_i = gl.zeros([ROWS], gl.float32, OF_ROW)
    for begun in range(0, parts, PARTS):
        i = begun + gl.arange(0, PARTS, layout=OF_PART)
        slot = slot_of(first, i, consumer, EVEN, CONSUMERS)[:, None]
        ok = (i < parts)[:, None] & (r < rows)[None, :]
        ml = partial_ml + slot * (2 * BLOCK_M) + r[None, :]
        at = gl.expand_dims(slot * (BLOCK_M * BLOCK_D) + (r * BLOCK_D)[None, :], 2)
        at = partial + at + gl.expand_dims(gl.expand_dims(columns, 0), 0)
        # past L1, which may hold what was there before
        m = gl.load(ml, mask=ok, other=float("-inf"), cache_modifier=".cg")
        l = gl.load(ml + BLOCK_M, mask=ok, other=0.0, cache_modifier=".cg")
        x = gl.load(at, mask=gl.expand_dims(ok, 2), other=0.0, cache_modifier=".cg")
        m_new = gl.maximum(m_i, gl.max(m, 0))
        finite = gl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = gl.exp2(m_i - finite)
        weight = gl.exp2(m - finite[None, :])
        l_i = l_i * alpha + gl.sum(weight * l, 0)
        before = merged * gl.convert_layout(alpha, TO_FLAT)[:, None]
        merged = before + gl.sum(x * gl.expand_dims(weight, 2), 0)
        m_i = m_new
    return (
        merged, gl.convert_layout(m_i, TO_FLAT), gl.convert_layout(l_i, TO_FLAT), gl.convert_layout(r, TO_FLAT), columns
    )  # fmt: skip
