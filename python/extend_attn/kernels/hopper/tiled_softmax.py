"""Logits, masks and the online softmax of a consumer's tile [rows, keys], in base 2 as in kernels/softmax.py."""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..softmax import LOG2E
from .tiled_work import ROWS

# Where the key tiles of a loop lie.
NEW, POOL, BOTH = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)


@gluon.jit
def scales(t, tiles, call, KEYS: gl.constexpr, c):
    """(factor of tile t's dot products, factor of its values)."""
    if c.UNIFIED or KEYS == POOL:
        return call.pool_scale, call.v_scale
    elif KEYS == NEW:
        return call.new_scale, gl.to_tensor(1.0)
    else:
        new = t < tiles.new_tiles
        return gl.where(new, call.new_scale, call.pool_scale), gl.where(new, 1.0, call.v_scale)


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
        position = item.prefix_len + token
        if c.OFFSETS:
            position += gl.load(call.window_offsets + item.sequence).to(gl.int32)
        if c.Q_POSITIONS:
            position = gl.load(call.q_positions + item.q_start + token, mask=token < item.extend_len, other=0)
        bent = gl.log2(gl.maximum(position, 1).to(gl.float32)) / call.log2_temperature_len
        factor = gl.where(position > call.temperature_len, bent, factor)
    return factor


@gluon.jit
def before_end(item, c):
    """Which columns of the prefix's last tile there are."""
    key = gl.arange(0, c.BLOCK_N, layout=gl.SliceLayout(0, c.S))
    return (key < item.prefix_len % c.BLOCK_N)[None, :]


@gluon.jit
def seen(t, tiles, place, item, call, KEYS: gl.constexpr, c):
    """Which keys of tile t the rows see: those that exist, up to the diagonal, from the window's start on."""
    start = (tiles.new_hi - 1 - t) * c.BLOCK_N
    limit = item.extend_len - start
    row = place.row0 - start
    if KEYS == BOTH:
        start = (tiles.pool_hi - 1 - (t - tiles.new_tiles)) * c.BLOCK_N
        limit = gl.where(t < tiles.new_tiles, limit, item.prefix_len - start)
        row = gl.where(t < tiles.new_tiles, row, place.row0 + item.prefix_len - start)
    key = gl.arange(0, c.BLOCK_N, layout=gl.SliceLayout(0, c.S))[None, :]
    rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, c.S))[:, None]
    visible = key < limit
    if c.CAUSAL:
        visible = visible & (key <= rows)
    if c.WINDOW:
        visible = visible & (rows <= key + call.window)
    return visible


@gluon.jit
def weigh(s, m, l, scale, SCALED: gl.constexpr, c):
    """One step of the online softmax: (weights, factor of what came before, maximum, sum).

    Logits that are not SCALED yet take one fused multiply-add. Every row has seen a key: the first tile of a walk holds
    its own token's, and splits have whole tiles.
    """
    if SCALED or c.CAP or c.TEMPERATURE:
        m_new = gl.maximum(m, gl.max(s, 1))
        p = gl.exp2(s - m_new[:, None])
    else:
        m_new = gl.maximum(m, gl.max(s, 1) * scale)
        p = gl.exp2(s * scale - m_new[:, None])
    alpha = gl.exp2(m - m_new)
    return p, alpha, m_new, l * alpha + gl.sum(p, 1)
