"""A packed tile's result: the output and its LSE, or a split's part of them. Accumulators are [value columns, rows]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .softmax import add_sink, natural_lse


@gluon.jit
def store_result(call, work, shape, acc, m_i, l_i):
    """Sink, division, output rows and LSE."""
    ROWS: gl.constexpr = gl.SliceLayout(0, shape.MMA)
    r = work.row_first + gl.arange(0, shape.BLOCK_M, layout=ROWS)
    token = r // shape.GROUP
    head = work.kv_head * shape.GROUP + r % shape.GROUP
    row_ok = token < work.extend_len
    if shape.SINKS:
        sink = gl.load(call.sinks + head, mask=row_ok, other=float("-inf")).to(gl.float32)
        alpha, m_i, l_i = add_sink(m_i, l_i, sink)
        acc = acc * alpha[None, :]
    out = acc * (1.0 / gl.where(l_i == 0.0, 1.0, l_i))[None, :]
    row = work.q_start + token
    columns = gl.arange(0, shape.BLOCK_D, layout=gl.SliceLayout(1, shape.MMA))
    rows = row * call.stride_ot + head.to(gl.int64) * call.stride_oh
    ok = row_ok[None, :] & (columns < shape.HEAD_DIM_V)[:, None]
    gl.store(call.o + rows[None, :] + columns[:, None], out.to(call.o.dtype.element_ty), mask=ok)
    if shape.LSE:
        gl.store(call.lse + row * shape.NUM_HEADS + head, natural_lse(m_i, l_i), mask=row_ok)


@gluon.jit
def store_part(call, work, shape, acc, m_i, l_i, slot):
    """A share's accumulator, maxima and sums in its slot, as kernels/combine.py reads them."""
    r = gl.arange(0, shape.BLOCK_M, layout=gl.SliceLayout(0, shape.MMA))
    columns = gl.arange(0, shape.BLOCK_D, layout=gl.SliceLayout(1, shape.MMA))
    slot = slot.to(gl.int64)
    gl.store(call.partial_ml + slot * (2 * shape.BLOCK_M) + r, m_i)
    gl.store(call.partial_ml + slot * (2 * shape.BLOCK_M) + shape.BLOCK_M + r, l_i)
    row_ok = work.row_first + r < work.extend_len * shape.GROUP
    ok = (row_ok & (work.first < work.last))[None, :] & (columns < shape.BLOCK_D)[:, None]
    gl.store(call.partial + slot * (shape.BLOCK_M * shape.BLOCK_D) + (r * shape.BLOCK_D)[None, :] + columns[:, None],
             acc, mask=ok)  # fmt: skip
