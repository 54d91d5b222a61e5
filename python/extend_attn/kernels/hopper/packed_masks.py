"""What the rows of a packed tile see of the keys of a tile: [keys, rows]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .packed_work import key_index, key_positions, tile_keys


@gluon.jit
def whole_places(call, work, shape):
    """[from, to): the places of the key list that every row of the tile sees."""
    if shape.MASK_PREFIX or (shape.WINDOW and shape.Q_POSITIONS) or not shape.HAS_POOL:
        return gl.to_tensor(0), gl.to_tensor(0)
    begin = gl.to_tensor(0)
    if shape.WINDOW:
        begin = work.prefix_len + work.token_last - call.window - work.pool_lo
    return begin, work.prefix_len - work.pool_lo


@gluon.jit
def rows_see(call, work, shape, i, token, row_position):
    """[BLOCK_N, ROWS]: which row sees which key of tile ``i``; no matter what of rows that are not real."""
    KEYS: gl.constexpr = gl.SliceLayout(1, shape.MMA)
    start, end = tile_keys(work, shape, i)
    place = start + gl.arange(0, shape.BLOCK_N, layout=KEYS)
    exists = place < end
    index = key_index(work, shape, place)
    seen = exists[:, None] & (token >= 0)[None, :]
    CAUSAL: gl.constexpr = shape.CAUSAL and not shape.MASK
    if CAUSAL:
        seen = seen & (index[:, None] <= (work.prefix_len + token)[None, :])
    if shape.WINDOW:
        position = key_positions(call, work, shape, index, exists)
        seen = seen & (row_position[None, :] <= (position + call.window)[:, None])
    if shape.MASK:
        masked = seen & (token < work.extend_len)[None, :]
        if not shape.MASK_PREFIX:
            masked = masked & (index >= work.prefix_len)[:, None]
        rows = work.mask_row + token.to(gl.int64) * work.mask_stride
        bytes_ = call.custom_mask + rows[None, :] + index.to(gl.int64)[:, None]
        seen = seen & (gl.load(bytes_, mask=masked, other=1) != 0)
    return seen
