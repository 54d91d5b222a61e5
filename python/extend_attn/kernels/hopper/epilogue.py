"""A packed tile's result: the output and its LSE, or a program's part. Accumulators are [value columns, rows]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .softmax import add_sink, natural_lse


@gluon.jit
def store_result(call, work, shape, acc, m_i, l_i):
    """Sink, division, output rows and LSE."""
    r = gl.arange(0, shape.ROWS, layout=gl.SliceLayout(0, shape.MMA))
    columns = gl.arange(0, shape.BLOCK_D, layout=gl.SliceLayout(1, shape.MMA))
    _store(call, work, shape, acc, m_i, l_i, r, columns, True, 0)


@gluon.jit
def store_rows(call, work, shape, acc, m_i, l_i, r, columns, with_lse):
    """The same for rows ``r`` of the tile and some of their columns; ``acc`` is [rows, columns]."""
    _store(call, work, shape, acc, m_i, l_i, r, columns, with_lse, 1)


@gluon.jit
def _store(call, work, shape, acc, m_i, l_i, r, columns, with_lse, ACROSS: gl.constexpr):
    """``ACROSS`` is the dimension of the accumulator's columns."""
    r = work.row_first + r
    token = r // shape.GROUP
    head = work.kv_head * shape.GROUP + r % shape.GROUP
    row_ok = token < work.extend_len
    if shape.SINKS:
        sink = gl.load(call.sinks + head, mask=row_ok, other=float("-inf")).to(gl.float32)
        alpha, m_i, l_i = add_sink(m_i, l_i, sink)
        acc = acc * gl.expand_dims(alpha, ACROSS)
    out = acc * gl.expand_dims(1.0 / gl.where(l_i == 0.0, 1.0, l_i), ACROSS)
    row = work.q_start + token
    rows = row * call.stride_ot + head.to(gl.int64) * call.stride_oh
    at = gl.expand_dims(rows, ACROSS) + gl.expand_dims(columns, 1 - ACROSS)
    ok = gl.expand_dims(row_ok, ACROSS) & gl.expand_dims(columns < shape.HEAD_DIM_V, 1 - ACROSS)
    gl.store(call.o + at, out.to(call.o.dtype.element_ty), mask=ok)
    if shape.LSE:
        gl.store(call.lse + row * shape.NUM_HEADS + head, natural_lse(m_i, l_i), mask=row_ok & with_lse)


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
