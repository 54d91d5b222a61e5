"""Logits and the online softmax of a consumer's tile [rows, keys], in base 2 as in kernels/softmax.py."""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..softmax import LOG2E
from .gluon_compat import constexpr_function
from .tiled_masks import NEW, POOL
from .tiled_work import ROWS, offset_of

SCALE_MIN = gl.constexpr(1e-36)  # stands for a scale of 0, which would make NaN of a hidden key's -inf
# Columns of values up to which weights are paired: d64_prefill takes 571 us, not 613, on an H200; prefill_long 353, not
# 348.
PAIRED_MAX = gl.constexpr(128)
# What a maximum may fall behind by, in powers of two, and tiles after a row's first in which it may not: few keys at
# the diagonal say little of what the rest will bring, and what comes after as many tiles seldom outdoes them. A weight
# above the maximum is rounded where 1 would not be: 2.5e-3 of the largest output with 8 from the first tile on, 1.5e-3
# so (tests/test_standing_maxima.py).
SLACK, EXACT = gl.constexpr(2.0), gl.constexpr(2)


@gluon.jit
def scales(t, tiles, call, KEYS: gl.constexpr, c):
    """(factor of tile t's dot products, factor of its values)."""
    if c.UNIFIED or KEYS == POOL:
        return gl.maximum(call.pool_scale, SCALE_MIN), call.v_scale
    elif KEYS == NEW:
        return gl.maximum(call.new_scale, SCALE_MIN), gl.to_tensor(1.0)
    else:
        new = t < tiles.new_tiles
        scale = gl.where(new, call.new_scale, call.pool_scale)
        return gl.maximum(scale, SCALE_MIN), gl.where(new, 1.0, call.v_scale)


@gluon.jit
def logits(s, scale, temperature, call, SCALED: gl.constexpr, c):
    """Dot products to base-2 logits: scale, cap, temperature. Without the last two they stay unscaled unless SCALED."""
    if c.NEGATE:
        s = -s
    if c.CAP:  # scale carries log2(e); tanh wants the natural logit
        e = gl.exp2(gl.abs(s) * (scale * (-2.0 / call.logit_cap)))
        y = (1.0 - e) / (1.0 + e) * (call.logit_cap * LOG2E)
        s = gl.where(s < 0, -y, y)
    elif SCALED or c.TEMPERATURE:
        s = s * scale
    if c.TEMPERATURE:
        s = s * temperature[:, None]
    return s


@gluon.jit
def temperature_of(call, item, row0, c):
    """xAI's factor a row: log2(position) / log2(length) past that length, 1 before."""
    factor = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(1, c.S))
    if c.TEMPERATURE:
        token = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, c.S))
        position = offset_of(item, call, c) + item.prefix_len + token
        if c.Q_POSITIONS:
            position = gl.load(call.q_positions + item.q_start + token, mask=token < item.extend_len, other=0)
        bent = gl.log2(gl.maximum(position, 1).to(gl.float32)) / call.log2_temperature_len
        factor = gl.where(position > call.temperature_len, bent, factor)
    return factor


@constexpr_function
def _rescale_assembly(number):
    """Products of ``number`` elements, which lie in two rows, and their factors, unless all factors of a warp are 1.
    An element and its product share a register: kept apart, they spill 780 bytes at head dim 128 with a prefix."""
    copies = " ".join(f"mov.f32 ${i}, ${number + i};" for i in range(number))
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * number + i};" for i in range(number))
    return f"""{{
        .reg .pred other, any;
        setp.neu.f32 other, ${2 * number}, 0f3F800000;
        setp.neu.or.f32 other, ${2 * number + 2}, 0f3F800000, other;
        vote.sync.any.pred any, other, 0xffffffff;
        {copies}
        @!any bra DONE;
        {products}
    DONE:
    }}"""


@constexpr_function
def _rescale_operands(number):
    return ",".join(["=f"] * number + ["f"] * (2 * number))


@gluon.jit
def rescale(o, alpha, LAYOUT: gl.constexpr):
    """An accumulator with its rows multiplied by ``alpha``; warps whose rows all keep their maxima skip that."""
    NUMBER: gl.constexpr = min(o.shape[1] // 2, 32)
    ASSEMBLY: gl.constexpr = _rescale_assembly(NUMBER)
    OPERANDS: gl.constexpr = _rescale_operands(NUMBER)
    factors, o = gl.broadcast(gl.convert_layout(alpha, gl.SliceLayout(1, LAYOUT))[:, None], o)
    return gl.inline_asm_elementwise(ASSEMBLY, OPERANDS, [o, factors], dtype=gl.float32, is_pure=True, pack=NUMBER)


@gluon.jit
def rounded(w, dtype: gl.constexpr, c):
    """Weights [rows, keys] for the products: as operand, or, if PAIRED, as words [rows, keys / 2] of two keys each.
    Words stay where the loop over tiles has them; of 16-bit values ptxas swaps all pairs once a tile, but for the
    first partition's."""
    if c.PAIRED:
        even, odd = gl.split(w.reshape([w.shape[0], w.shape[1] // 2, 2]))
        KIND: gl.constexpr = "f16x2" if dtype == gl.float16 else "bf16x2"
        ROUND: gl.constexpr = "cvt.rn." + KIND + ".f32 $0, $2, $1;"
        return gl.inline_asm_elementwise(ROUND, "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1)
    else:
        return gl.convert_layout(w.to(dtype), c.P)


@gluon.jit
def operand(p, dtype: gl.constexpr, c):
    """What ``rounded`` gave as the products' operand; costs nothing."""
    if c.PAIRED:
        HALVES: gl.constexpr = "mov.b32 {$0, $1}, $2;"
        if dtype == gl.float16:
            even, odd = gl.inline_asm_elementwise(
                HALVES, "=h,=h,r", [p], dtype=(gl.float16, gl.float16), is_pure=True, pack=1
            )
        else:
            even, odd = gl.inline_asm_elementwise(
                HALVES, "=h,=h,r", [p], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1
            )
        p = gl.convert_layout(gl.join(even, odd).reshape([p.shape[0], p.shape[1] * 2]), c.P, assert_trivial=True)
    return p


@gluon.jit
def lane_sums(p):
    """Sums [rows, 4] of what each lane holds of a row of ``p``; ``row_sums`` adds them up once a walk is over. Sums
    over lanes a tile cost 2 to 4 %."""
    in_lanes = p.reshape([p.shape[0], p.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(in_lanes, 3), 1)


@gluon.jit
def no_sums(c):
    return lane_sums(gl.zeros([ROWS, c.BLOCK_N], gl.float32, c.S))


@gluon.jit
def row_sums(l, c):
    return gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, c.S))


@gluon.jit
def weigh(s, m, l, scale, slack, MASKED: gl.constexpr, c):
    """One step of the online softmax: (weights, factor of what came before, maximum, lanes' sums).

    Logits that are not scaled yet take one fused multiply-add. Every row has seen a key, its own token's in a
    walk's first tile, or all of one that is not MASKED, unless UNSEEN. A maximum stands until it would grow by more
    than ``slack``: the result is the same but for rounding, weights are at most 2 ** slack, and accumulators are rarely
    rescaled.
    """
    if c.CAP or c.TEMPERATURE:
        m_new = gl.maximum(m, gl.max(s, 1))
    else:
        m_new = gl.maximum(m, gl.max(s, 1) * scale)
    m_new = gl.where(m_new > m + slack, m_new, m)
    finite = m_new
    if MASKED and c.UNSEEN:
        finite = gl.where(m_new == float("-inf"), 0.0, m_new)
    if c.CAP or c.TEMPERATURE:
        p = gl.exp2(s - finite[:, None])
    else:
        p = gl.exp2(s * scale - finite[:, None])
    alpha = gl.exp2(m - finite)
    in_lanes = gl.convert_layout(alpha, gl.SliceLayout(1, l.type.layout), assert_trivial=True)
    return p, alpha, m_new, l * in_lanes[:, None] + lane_sums(p)
