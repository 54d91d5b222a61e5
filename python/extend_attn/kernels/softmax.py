"""Logits and the online softmax, in base 2: the pieces that both kernel families share.

Everything is kept in units of log2: a logit of 1.0 here is one doubling. The scale that turns a dot product into such
a logit is ``sm_scale * k_scale * log2(e)``, never negative (the launcher moves the sign into the query), so that the
maximum of a row can be taken before scaling.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """tanh by exp2. ``PRECISE`` (fp32 inputs) adds the odd Taylor polynomial near zero, where 1 - exp2 cancels."""
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)
    y = (1.0 - e) / (1.0 + e)
    y = tl.where(x < 0, -y, y)
    if PRECISE:
        z = x * x
        small = x + x * z * (-0.33333333333 + z * (0.13333333333 + z * (-0.05396825397 + z * 0.02186948854)))
        y = tl.where(tl.abs(x) < 0.3, small, y)
    return y


@triton.jit
def logits(s, scale, logit_cap, temperature, CAP: tl.constexpr, TEMPERATURE: tl.constexpr, PRECISE: tl.constexpr):
    """Dot products to base-2 logits: scale, cap, then temperature (one factor a row)."""
    if CAP:
        # scale carries log2(e); tanh wants the natural logit
        s = tanh(s * (scale / (LOG2E * logit_cap)), PRECISE) * (logit_cap * LOG2E)
    else:
        s = s * scale
    if TEMPERATURE:
        s = s * temperature[:, None]
    return s


@triton.jit
def step(s, m_i, l_i, scale, RAW: tl.constexpr, MASKED: tl.constexpr):
    """One step of the online softmax: returns (p, alpha, m, l).

    ``s`` [M, N] holds base-2 logits, or dot products still to be scaled if ``RAW`` (one fused multiply-add an element
    then does both). ``m_i`` is the running maximum, ``l_i`` the running sum. ``MASKED``: a row may have seen no key
    yet, and its maximum of -inf must not turn into NaN.
    """
    if RAW:
        m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
    else:
        m_new = tl.maximum(m_i, tl.max(s, 1))
        finite = m_new
        if MASKED:
            finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - finite[:, None])
        alpha = tl.exp2(m_i - finite)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def add_sink(acc, m_i, l_i, sink):
    """Adds a value-less logit ``sink`` [M] (natural units) to the denominator."""
    sink = sink * LOG2E
    m_new = tl.maximum(m_i, sink)
    finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m_i - finite)
    return acc * alpha[:, None], m_new, l_i * alpha + tl.exp2(sink - finite)


@triton.jit
def normalise(acc, l_i):
    """The output of a tile; a row that saw nothing (``l_i == 0``) is 0."""
    return acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]


@triton.jit
def natural_lse(m_i, l_i):
    """Natural log of the denominator; -inf for a row that saw nothing."""
    lse = (m_i + tl.log2(tl.where(l_i == 0.0, 1.0, l_i))) * LN2
    return tl.where(l_i == 0.0, float("-inf"), lse)
