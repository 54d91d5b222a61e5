"""Which work a program does: one pair of sequence and KV head, a fixed share of one, or an even share of them all.

EVEN shares cut the tiles of all pairs, laid end to end, into as many equal runs as there are programs, so that a ragged
batch keeps every multiprocessor busy to the end. A run covers the end of one pair, some whole pairs and the start of
another, and so leaves at most two parts (merge.py). If one pair a program is as even as equal runs would be, give or
take SNAP, nothing is cut.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_compat import struct
from .packed_work import MIN_SPLIT_KEYS, split_size, work_of

CHUNK = gl.constexpr(128)  # sequences looked at in one step
SNAP_PERCENT = gl.constexpr(112)


@struct
class Share:
    """Tiles [cursor, end) of the lists laid end to end, the first of them in ``sequence``, whose own begin at ``base``.

    ``size``: tiles of every program's run. ``padded``: if > 0, what every list counts for, whatever its length.
    """

    cursor: gl.tensor
    end: gl.tensor
    size: gl.tensor
    padded: gl.tensor
    sequence: gl.tensor
    base: gl.tensor


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _tiles(call, shape, b, ok):
    """Tiles of the lists of sequences ``b`` (at least as many as a pair has); 0 for one without new tokens."""
    extend_len = (gl.load(call.qo_indptr + b + 1, mask=ok, other=0) - gl.load(call.qo_indptr + b, mask=ok, other=0)).to(
        gl.int32
    )
    if shape.UNIFIED:
        prefix_len = gl.load(call.prefix_lens + b, mask=ok, other=0).to(gl.int32)
    else:
        prefix_len = (
            gl.load(call.kv_indptr + b + 1, mask=ok, other=0) - gl.load(call.kv_indptr + b, mask=ok, other=0)
        ).to(gl.int32)
    if shape.APART:
        tiles = gl.cdiv(prefix_len, shape.BLOCK_N) + gl.cdiv(extend_len, shape.BLOCK_N)
    else:
        tiles = gl.cdiv(prefix_len + extend_len, shape.BLOCK_N)
    return gl.where(extend_len > 0, tiles, 0)


@gluon.jit
def _padded(tiles, padded):
    return gl.where((padded > 0) & (tiles > 0), padded, tiles)


@gluon.jit
def even_share(call, shape, batch_size, pairs):
    """This program's Share of a batch with ``pairs`` pairs a sequence."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    ids = gl.arange(0, CHUNK, layout=LAYOUT)
    programs = gl.num_programs(0)
    total = gl.to_tensor(0)
    most = gl.to_tensor(0)
    lists = gl.to_tensor(0)
    leading = _tiles(call, shape, ids, ids < batch_size)
    tiles = leading
    for start in range(0, batch_size, CHUNK):
        if start > 0:
            tiles = _tiles(call, shape, start + ids, start + ids < batch_size)
        total += gl.sum(tiles, 0) * pairs
        lists += gl.sum((tiles > 0).to(gl.int32), 0) * pairs
        most = gl.maximum(most, gl.max(tiles, 0))
    tiles = leading
    whole = (lists <= programs) & (most * programs * 100 <= total * SNAP_PERCENT)
    padded = gl.where(whole, most, 0)
    size = gl.maximum(gl.cdiv(total, programs), MIN_SPLIT_KEYS // shape.BLOCK_N)
    size = gl.where(whole, most, size)
    total = gl.where(whole, most * lists, total)
    cursor = gl.program_id(0) * size
    sequence = gl.to_tensor(0)
    before = gl.to_tensor(0)
    passed = gl.to_tensor(0)
    for start in range(0, batch_size, CHUNK):
        if start > 0:
            tiles = _tiles(call, shape, start + ids, start + ids < batch_size)
        tiles = _padded(tiles, padded)
        over = (before + gl.associative_scan(tiles, 0, _add)) * pairs <= cursor
        sequence += gl.sum((over & (start + ids < batch_size)).to(gl.int32), 0)
        passed += gl.sum(gl.where(over, tiles, 0), 0)
        before += gl.sum(tiles, 0)
    return Share(cursor, gl.minimum(cursor + size, total), size, padded, sequence, passed * pairs)


@gluon.jit
def next_work(call, shape, share, cursor, sequence, base, pairs, num_splits, WHO: gl.constexpr = 0):
    """(Work, and where its pair's tiles begin; cursor, sequence and base after it)."""
    if shape.EVEN:
        tiles = _padded(_tiles(call, shape, sequence, True), share.padded)
        while cursor >= base + tiles * pairs:
            base += tiles * pairs
            sequence += 1
            tiles = _padded(_tiles(call, shape, sequence, True), share.padded)
        pair = (cursor - base) // tiles
        start = base + pair * tiles
        stop = gl.minimum(share.end - start, tiles)
        work = work_of(call, shape, sequence, pair, 0, 1, cursor - start, stop, WHO)
        cursor = start + stop
    else:
        tile = gl.program_id(0) // num_splits
        split = gl.program_id(0) % num_splits
        work = work_of(call, shape, tile // pairs, tile % pairs, split, num_splits, 0, 0, WHO)
        start = gl.to_tensor(0)
        cursor = share.end
    return work, start, cursor, sequence, base


@gluon.jit
def parts_of(shape, share, work, start, num_splits):
    """(which part of its pair this work is, how many there are): the parts of programs side by side, where ``start`` is
    next_work's. A work without tiles, past the last part, has a number that is no part's."""
    tiles = gl.maximum(work.tiles, 1)
    if shape.EVEN:
        first = start // share.size
        parts = (start + tiles - 1) // share.size - first + 1
        part = gl.program_id(0) - first
    else:
        parts = gl.cdiv(tiles, split_size(shape, tiles, num_splits))
        part = gl.program_id(0) % num_splits
    return part, parts
