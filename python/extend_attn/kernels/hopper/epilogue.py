"""A packed tile's result: the output and its LSE, or a program's part. Accumulators are [value columns, rows]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .softmax import add_sink, natural_lse


@gluon.jit
def store_result(call, work, shape, acc, m_i, l_i, place):
    """Sink, division, output rows and LSE. An output of the query's type is turned in ``place`` [rows, columns], and so
    leaves in whole rows."""
    r = gl.arange(0, shape.ROWS, layout=gl.SliceLayout(0, shape.MMA))
    columns = gl.arange(0, shape.BLOCK_D, layout=gl.SliceLayout(1, shape.MMA))
    kind: gl.constexpr = call.o.dtype.element_ty
    if kind == place.dtype:
        out = _divided(call, work, shape, acc, m_i, l_i, r, True, 0)
        place.store(gl.permute(out.to(kind), (1, 0)))
        LANES: gl.constexpr = min(shape.BLOCK_D // 8, 32)
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
        r = gl.arange(0, shape.ROWS, layout=gl.SliceLayout(1, LAYOUT))
        columns = gl.arange(0, shape.BLOCK_D, layout=gl.SliceLayout(0, LAYOUT))
        _store(call, work, shape, place.load(LAYOUT), r, columns, 1)
    else:
        _store(call, work, shape, _divided(call, work, shape, acc, m_i, l_i, r, True, 0), r, columns, 0)


@gluon.jit
def store_rows(call, work, shape, acc, m_i, l_i, r, columns, with_lse):
    """The same for rows ``r`` of the tile and some of their columns; ``acc`` is [rows, columns]."""
    _store(call, work, shape, _divided(call, work, shape, acc, m_i, l_i, r, with_lse, 1), r, columns, 1)


@gluon.jit
def _divided(call, work, shape, acc, m_i, l_i, r, with_lse, ACROSS: gl.constexpr):
    """The output of rows ``r``, once their LSE is stored. ``ACROSS`` is the dimension of the accumulator's columns."""
    r = work.row_first + r
    token = r // shape.GROUP
    head = work.kv_head * shape.GROUP + r % shape.GROUP
    row_ok = token < work.extend_len
    if shape.SINKS:
        sink = gl.load(call.sinks + head, mask=row_ok, other=float("-inf")).to(gl.float32)
        alpha, m_i, l_i = add_sink(m_i, l_i, sink)
        acc = acc * gl.expand_dims(alpha, ACROSS)
    if shape.LSE:
        row = work.q_start + token
        gl.store(call.lse + row * shape.NUM_HEADS + head, natural_lse(m_i, l_i), mask=row_ok & with_lse)
    return acc * gl.expand_dims(1.0 / gl.where(l_i == 0.0, 1.0, l_i), ACROSS)


@gluon.jit
def _store(call, work, shape, out, r, columns, ACROSS: gl.constexpr):
    r = work.row_first + r
    token = r // shape.GROUP
    head = work.kv_head * shape.GROUP + r % shape.GROUP
    rows = (work.q_start + token) * call.stride_ot + head.to(gl.int64) * call.stride_oh
    at = call.o + (gl.expand_dims(rows, ACROSS) + gl.expand_dims(columns, 1 - ACROSS))
    if ACROSS == 1 and out.dtype == call.q.dtype.element_ty:
        at = gl.max_contiguous(gl.multiple_of(at, [1, 16]), [1, 8])
    ok = gl.expand_dims(token < work.extend_len, ACROSS) & gl.expand_dims(columns < shape.HEAD_DIM_V, 1 - ACROSS)
    gl.store(at, out.to(call.o.dtype.element_ty), mask=ok)


@gluon.jit
def store_part(call, work, shape, acc, m_i, l_i, slot):
    """A program's accumulator, maxima and sums in its slot (64 bits): ``partial`` [slots, ROWS, BLOCK_D],
    ``partial_ml`` [slots, 2, ROWS]. Rows that are not real are left out."""
    r = gl.arange(0, shape.ROWS, layout=gl.SliceLayout(0, shape.MMA))
    columns = gl.arange(0, shape.BLOCK_D, layout=gl.SliceLayout(1, shape.MMA))
    row_ok = work.row_first + r < work.extend_len * shape.GROUP
    gl.store(call.partial_ml + slot * (2 * shape.ROWS) + r, m_i, mask=row_ok)
    gl.store(call.partial_ml + slot * (2 * shape.ROWS) + shape.ROWS + r, l_i, mask=row_ok)
    ok = row_ok[None, :] & (columns < shape.BLOCK_D)[:, None]
    gl.store(call.partial + slot * (shape.ROWS * shape.BLOCK_D) + (r * shape.BLOCK_D)[None, :] + columns[:, None],
             acc, mask=ok)  # fmt: skip
