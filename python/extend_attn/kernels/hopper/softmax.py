"""Logits and the online softmax in base 2, transposed: [keys, rows]. The rules are those of kernels/softmax.py."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_compat import constexpr_function

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
# What a maximum may fall behind by, in powers of two. The weight of a key that outdoes it is rounded where 1 would not
# be, and where that key takes nearly all of the sum, the sum must be rounded with it: else 3 costs 2.7e-3 of the
# largest output (tests/test_standing_maxima.py). An LSE asks for sums that are not rounded, and so for less slack.
SLACK, SLACK_LSE = gl.constexpr(3.0), gl.constexpr(1.0)
NONE_SEEN = gl.constexpr(-3.0e38)  # the maximum of a row that has seen no key: finite, so that -inf minus it is -inf


@gluon.jit
def tanh(x):
    e = gl.exp2(gl.abs(x) * -2.8853900817779268)
    y = (1.0 - e) / (1.0 + e)
    return gl.where(x < 0, -y, y)


@gluon.jit
def bent_logits(s, scale, call, row_position, shape):
    """Dot products to base-2 logits where there is a cap or a temperature (one factor a row)."""
    if shape.CAP:
        s = tanh(s * (scale / (LOG2E * call.logit_cap))) * (call.logit_cap * LOG2E)
    else:
        s = s * scale
    if shape.TEMPERATURE:
        factor = gl.log2(gl.maximum(row_position, 1).to(gl.float32)) / call.log2_temperature_len
        s = s * gl.where(row_position > call.temperature_len, factor, 1.0)[None, :]
    return s


@gluon.jit
def _of_threads(x):
    """[keys, rows] as [warps, 2, lanes, row blocks, lanes, 2]: what a thread holds lies along the 2s and the blocks."""
    return x.reshape([x.shape[0] // 16, 2, 8, x.shape[1] // 8, 4, 2])


@constexpr_function
def _everywhere():
    """All four flags in each thread."""
    return gl.DistributedLinearLayout([[1], [2]], [[0]] * 5, [[0]] * 2, [], [4])


@gluon.jit
def any_over(x, limit, flags):
    """Whether any logit is over ``limit``. Each warp leaves a word in ``flags`` [4], which takes one barrier; a
    reduction over the warpgroup takes two, and shuffles."""
    x = gl.max(gl.max(gl.max(_of_threads(x), 5), 3), 1)
    over = (x > limit).to(gl.int32)
    lanes = over.reshape([over.shape[0] // 4, 4, 32]) if over.shape[0] > 4 else over.reshape([4, 32])
    if over.shape[0] > 4:
        lanes = gl.max(lanes, 0)
    flags.store(gl.max(lanes, 1))
    return gl.max(flags.load(_everywhere()), 0) > 0


@gluon.jit
def thread_sums(p):
    """Sums [half of the keys, rows] of what each thread holds of a row; ``row_sums`` adds them up at the end."""
    return gl.sum(p.reshape([p.shape[0] // 16, 2, 8, p.shape[1]]), 1).reshape([p.shape[0] // 2, p.shape[1]])


@gluon.jit
def no_sums(shape):
    return thread_sums(gl.zeros([shape.BLOCK_N, shape.ROWS], gl.float32, shape.MMA))


@gluon.jit
def row_sums(sums, shape):
    return gl.convert_layout(gl.sum(sums, 0), gl.SliceLayout(0, shape.MMA))


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
