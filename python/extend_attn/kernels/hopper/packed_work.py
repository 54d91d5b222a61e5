"""What the packed Hopper kernel works on: its compile-time shape, a call's tensors and scalars, one program's share.

A sequence and KV head has one *key list*: the pool keys that some row of the tile may see, then (two-stage) the new
tokens' own. A key's *index* counts from the sequence's first prefix key, in the pool and beyond it alike, so that one
set of rules serves both. Lists are cut into tiles of BLOCK_N keys, and shared out by tiles.
"""

# No `from __future__ import annotations`: an aggregate's fields are checked against the annotations themselves.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_compat import struct

# A split is worth its partial result from about this many keys on.
MIN_SPLIT_KEYS = gl.constexpr(128)
FAR: gl.constexpr = gl.constexpr(0x7FFFFFFF)


@struct
class Shape:
    """Compile-time facts. CONSUMERS, of four warps each, have ROWS of a tile's BLOCK_M rows each.

    APART: pool and new keys never share a tile, because their type or scale differs. V_HALF: values of an fp8 pool are
    multiplied as fp16 beside a bf16 query; P, at most 2 ** SLACK, loses nothing by that. Only where all values come
    from the pool: of products of either type in two branches ptxas (Triton 3.6's) makes wrong ones. CODE_TILES: places
    for tiles of codes in shared memory; 0: they wait in registers. SPLIT: a list goes to a fixed number of programs in
    equal shares; EVEN: all lists together do (shares.py).
    """

    NUM_HEADS: gl.constexpr
    GROUP: gl.constexpr
    HEAD_DIM: gl.constexpr
    HEAD_DIM_V: gl.constexpr
    BLOCK_D: gl.constexpr
    BLOCK_PE: gl.constexpr
    BLOCK_M: gl.constexpr
    ROWS: gl.constexpr
    CONSUMERS: gl.constexpr
    BLOCK_N: gl.constexpr
    HAS_POOL: gl.constexpr
    UNIFIED: gl.constexpr
    CAUSAL: gl.constexpr
    WINDOW: gl.constexpr
    MASK: gl.constexpr
    MASK_PREFIX: gl.constexpr
    SINKS: gl.constexpr
    CAP: gl.constexpr
    TEMPERATURE: gl.constexpr
    Q_POSITIONS: gl.constexpr
    OFFSETS: gl.constexpr
    LSE: gl.constexpr
    V_SCALED: gl.constexpr
    V_IS_K: gl.constexpr
    NEGATE_Q: gl.constexpr
    APART: gl.constexpr
    FP8: gl.constexpr
    V_HALF: gl.constexpr
    CODE_TILES: gl.constexpr
    SPLIT: gl.constexpr
    EVEN: gl.constexpr
    MMA: gl.constexpr


@struct
class Call:
    """Pointers (of what is off, any other stands in), strides in elements, scalars."""

    q: gl.tensor
    k_new: gl.tensor
    v_new: gl.tensor
    o: gl.tensor
    k_pool: gl.tensor
    v_pool: gl.tensor
    qo_indptr: gl.tensor
    kv_indptr: gl.tensor
    kv_indices: gl.tensor
    prefix_lens: gl.tensor
    custom_mask: gl.tensor
    mask_indptr: gl.tensor
    sinks: gl.tensor
    window_offsets: gl.tensor
    q_positions: gl.tensor
    lse: gl.tensor
    partial: gl.tensor
    partial_ml: gl.tensor
    arrivals: gl.tensor
    stride_qt: gl.tensor
    stride_qh: gl.tensor
    stride_kt: gl.tensor
    stride_kh: gl.tensor
    stride_vt: gl.tensor
    stride_vh: gl.tensor
    stride_ot: gl.tensor
    stride_oh: gl.tensor
    stride_ks: gl.tensor
    stride_kg: gl.tensor
    stride_vs: gl.tensor
    stride_vg: gl.tensor
    window: gl.tensor
    sm_scale: gl.tensor
    pool_scale: gl.tensor
    v_scale: gl.tensor
    logit_cap: gl.tensor
    temperature_len: gl.tensor
    log2_temperature_len: gl.tensor


@struct
class Work:
    """One program's share: a block of rows of a sequence and KV head, from ``row_first`` on (a consumer's own); tiles
    [first, last); the tokens of the block's rows.

    The key list has ``pool_keys`` keys from index ``pool_lo`` on, then new ones from index ``new_lo`` on up to ``keys``
    in all, in ``tiles`` tiles. ``pool_tiles``: where tiles of new keys begin (APART). ``mask_row`` is the byte of token
    0's first column.
    """

    sequence: gl.tensor
    pair: gl.tensor
    kv_head: gl.tensor
    row_first: gl.tensor
    token_first: gl.tensor
    token_last: gl.tensor
    q_start: gl.tensor
    extend_len: gl.tensor
    kv_start: gl.tensor
    prefix_len: gl.tensor
    offset: gl.tensor
    pool_lo: gl.tensor
    pool_keys: gl.tensor
    new_lo: gl.tensor
    keys: gl.tensor
    pool_tiles: gl.tensor
    tiles: gl.tensor
    first: gl.tensor
    last: gl.tensor
    mask_row: gl.tensor
    mask_stride: gl.tensor


@gluon.jit
def work_of(call, shape, b, pair, share, num_shares, begin, end, WHO: gl.constexpr):
    """Consumer WHO's Work on a pair (block of rows, KV head) of sequence ``b``; no tiles where the sequence has no such
    rows.

    Its tiles are share ``share`` of ``num_shares`` equal ones (SPLIT), those of [begin, end) that exist (EVEN), or all.
    """
    HEADS: gl.constexpr = shape.NUM_HEADS // shape.GROUP
    q_start = gl.load(call.qo_indptr + b).to(gl.int64)
    extend_len = (gl.load(call.qo_indptr + b + 1) - q_start).to(gl.int32)
    kv_start = gl.load(call.kv_indptr + b).to(gl.int64)
    if shape.UNIFIED:
        prefix_len = gl.load(call.prefix_lens + b).to(gl.int32)
    else:
        prefix_len = (gl.load(call.kv_indptr + b + 1) - kv_start).to(gl.int32)
    offset = gl.to_tensor(0)
    if shape.OFFSETS:
        offset = gl.load(call.window_offsets + b).to(gl.int32)
    row_first = pair // HEADS * shape.BLOCK_M
    token_first = row_first // shape.GROUP
    token_last = gl.minimum((row_first + shape.BLOCK_M - 1) // shape.GROUP, extend_len - 1)

    # which keys some row of the tile may see
    pos_min = offset + prefix_len + token_first
    if shape.WINDOW and shape.Q_POSITIONS:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        token = token_first + gl.arange(0, shape.BLOCK_M, layout=LAYOUT)
        positions = gl.load(call.q_positions + q_start + token, mask=token <= token_last, other=FAR)
        pos_min = gl.min(positions, 0)
    pool_lo = gl.to_tensor(0)
    new_lo = gl.to_tensor(0)
    ROW_LIMIT: gl.constexpr = shape.CAUSAL and not shape.MASK  # new keys end with the last row's own
    new_hi = extend_len
    if ROW_LIMIT:
        new_hi = token_last + 1
    if shape.WINDOW:
        pool_lo = gl.maximum(pos_min - call.window - offset, 0)
        if shape.Q_POSITIONS:  # new tokens' positions are free: any may be seen
            pool_lo = gl.minimum(pool_lo, prefix_len)
        else:
            new_lo = gl.minimum(gl.maximum(token_first - call.window, 0), new_hi)
    if shape.UNIFIED:
        pool_hi = prefix_len + new_hi
        new_keys = gl.to_tensor(0)
    else:
        pool_hi = prefix_len
        new_keys = new_hi - new_lo
    if not shape.HAS_POOL:
        pool_hi = gl.to_tensor(0)
    pool_lo = gl.minimum(pool_lo, pool_hi)
    pool_keys = pool_hi - pool_lo
    keys = pool_keys + new_keys

    pool_tiles = gl.cdiv(pool_keys, shape.BLOCK_N)
    tiles = gl.cdiv(keys, shape.BLOCK_N)
    if shape.APART:
        tiles = pool_tiles + gl.cdiv(new_keys, shape.BLOCK_N)
    tiles = gl.where(token_first < extend_len, tiles, 0)
    first = gl.to_tensor(0)
    last = tiles
    if shape.SPLIT:
        size = split_size(shape, tiles, num_shares)
        first = gl.minimum(share * size, tiles)
        last = gl.minimum(first + size, tiles)
    elif shape.EVEN:
        first = gl.minimum(begin, tiles)
        last = gl.minimum(end, tiles)

    mask_row = gl.to_tensor(0).to(gl.int64)
    mask_stride = mask_row
    if shape.MASK:
        cut = offset
        if shape.UNIFIED:
            cut = gl.to_tensor(0)
        mask_stride = (prefix_len + extend_len + cut).to(gl.int64)
        mask_row = gl.load(call.mask_indptr + b).to(gl.int64) + cut
    return Work(
        b, pair, pair % HEADS, row_first + WHO * shape.ROWS, token_first, token_last, q_start, extend_len, kv_start,
        prefix_len, offset, pool_lo, pool_keys, new_lo, keys, pool_tiles, tiles, first, last, mask_row, mask_stride,
    )  # fmt: skip


@gluon.jit
def split_size(shape, tiles, num_splits):
    """Tiles of each split, as long as there are any."""
    return gl.maximum(gl.cdiv(tiles, num_splits), (MIN_SPLIT_KEYS + shape.BLOCK_N - 1) // shape.BLOCK_N)


@gluon.jit
def tile_keys(work, shape, i):
    """(place in the key list of tile ``i``'s first key, where the tile's source ends in it)."""
    start = i * shape.BLOCK_N
    end = work.keys
    if shape.APART:
        pool = i < work.pool_tiles
        start = gl.where(pool, start, work.pool_keys + (i - work.pool_tiles) * shape.BLOCK_N)
        end = gl.where(pool, work.pool_keys, end)
    return start, end


@gluon.jit
def key_index(work, shape, place):
    """The index of the keys at these places of the list."""
    index = work.pool_lo + place
    if not shape.UNIFIED:
        index = gl.where(place < work.pool_keys, index, work.prefix_len + work.new_lo + place - work.pool_keys)
    return index


@gluon.jit
def key_positions(call, work, shape, index, exists):
    """The absolute positions of keys, for the window."""
    position = work.offset + index
    if shape.Q_POSITIONS:
        new = exists & (index >= work.prefix_len)
        own = gl.load(call.q_positions + work.q_start + (index - work.prefix_len), mask=new, other=0)
        position = gl.where(new, own, position)
    return position
