"""Logits and the online softmax in base 2, transposed: [keys, rows]. The rules are those of kernels/softmax.py."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def tanh(x):
    e = gl.exp2(gl.abs(x) * -2.8853900817779268)
    y = (1.0 - e) / (1.0 + e)
    return gl.where(x < 0, -y, y)


@gluon.jit
def logits(s, scale, call, row_position, shape):
    """Dot products to base-2 logits: scale, cap, then temperature (one factor a row)."""
    if shape.CAP:
        s = tanh(s * (scale / (LOG2E * call.logit_cap))) * (call.logit_cap * LOG2E)
    else:
        s = s * scale
    if shape.TEMPERATURE:
        factor = gl.log2(gl.maximum(row_position, 1).to(gl.float32)) / call.log2_temperature_len
        s = s * gl.where(row_position > call.temperature_len, factor, 1.0)[None, :]
    return s


@gluon.jit
def step(s, m_i):
    """One step of the online softmax over logits [keys, rows]: (weights, factor of what came before, maximum)."""
    m_new = gl.maximum(m_i, gl.max(s, 0))
    finite = gl.where(m_new == float("-inf"), 0.0, m_new)  # a row may have seen no key yet
    return gl.exp2(s - finite[None, :]), gl.exp2(m_i - finite), m_new


@gluon.jit
def add_sink(m_i, l_i, sink):
    """(factor of the accumulator, maximum, sum) once a value-less logit ``sink`` (natural units) has joined."""
    sink = sink * LOG2E
    m_new = gl.maximum(m_i, sink)
    finite = gl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = gl.exp2(m_i - finite)
    return alpha, m_new, l_i * alpha + gl.exp2(sink - finite)


@gluon.jit
def natural_lse(m_i, l_i):
    """Natural log of the denominator; -inf for a row that saw nothing."""
    lse = (m_i + gl.log2(gl.where(l_i == 0.0, 1.0, l_i))) * LN2
    return gl.where(l_i == 0.0, float("-inf"), lse)
