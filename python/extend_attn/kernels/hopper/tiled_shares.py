"""Which keys of which items a program takes where there are fewer items than multiprocessors.

Program p owns item p: its first ``size`` key tiles. What is left of longer items lies end to end on a line, an item's
heads side by side, and the programs that own none take ``size`` of it each. Where runs of that length can begin with
an item, lines are padded to that (*aligned*): a program then has one part. Otherwise a run goes over the end of one
item into the next, as often as it takes, and an item is LEAD longer, which is what a further part costs. Lengths are
read on the device; ``size`` is the least that the programs can do.
"""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_compat import struct
from .tiled_work import MIN_TILES, ROW_BLOCKS_MAX, Part

LEAD = gl.constexpr(4)  # key tiles in whose time a part's query comes and its result leaves
FINENESS = gl.constexpr(64)  # steps in which ``size`` doubles
NOTHING = gl.constexpr(0x7FFFFFFF)


@struct
class Shares:
    """How items are cut, and where on the line the program is."""

    size: gl.tensor
    aligned: gl.tensor
    cursor: gl.tensor


@gluon.jit
def _tiles(call, c):
    """(numbers of all blocks of rows, the key tiles that each sees, 0 where it has no tokens), as tiles_of has them."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([ROW_BLOCKS_MAX // 32], [32], [gl.num_warps()], [0])
    i = gl.arange(0, ROW_BLOCKS_MAX, layout=LAYOUT)
    b = i // call.row_blocks
    first = i % call.row_blocks * c.TOKENS
    ok = b < call.batch_size
    rows = gl.load(call.qo_indptr + b + 1, mask=ok, other=0) - gl.load(call.qo_indptr + b, mask=ok, other=0)
    rows = rows.to(gl.int32)
    keys = rows
    if c.CAUSAL:
        keys = gl.minimum(first + c.TOKENS, rows)
    tiles = gl.cdiv(keys, c.BLOCK_N)
    if c.HAS_POOL:
        if c.UNIFIED:
            before = gl.load(call.prefix_lens + b, mask=ok, other=0).to(gl.int32)
        else:
            stop = gl.load(call.kv_indptr + b + 1, mask=ok, other=0)
            before = (stop - gl.load(call.kv_indptr + b, mask=ok, other=0)).to(gl.int32)
        tiles += gl.cdiv(before, c.BLOCK_N)
    return i, gl.where(first < rows, tiles, 0)


@gluon.jit
def _widths(tiles, size, aligned):
    """What an item of each block takes of the line."""
    rest = tiles - size
    width = gl.where((rest > 0) & (aligned > 0), gl.cdiv(rest, size) * size, rest + LEAD)
    return gl.where(rest > 0, width, 0)


@gluon.jit
def _before(block, i, widths):
    return gl.sum(gl.where(i < block, widths, 0), 0)


@gluon.jit
def _wider(size):
    return size + gl.maximum(size // FINENESS, 1)


@gluon.jit
def cut(heads, call, c):
    """The program's Shares; ``heads`` items a block of rows."""
    i, tiles = _tiles(call, c)
    programs = gl.num_programs(0)
    helpers = programs - call.batch_size * call.row_blocks * heads
    most = gl.max(tiles, 0)
    least = gl.maximum(gl.cdiv(gl.sum(tiles, 0) * heads, programs), MIN_TILES)
    size = gl.maximum(least, gl.cdiv(most, call.splits))
    while gl.sum(_widths(tiles, size, 1), 0) * heads > helpers * size:
        size = _wider(size)
    # a run may begin anywhere: an item then has one part more than its length says
    uneven = gl.maximum(least, gl.cdiv(most, gl.maximum(call.splits - 1, 1)))
    while (uneven < size) & (gl.sum(_widths(tiles, uneven, 0), 0) * heads > helpers * uneven):
        uneven = _wider(uneven)
    aligned = (uneven >= size).to(gl.int32)
    size = gl.minimum(size, uneven)
    helper = gl.program_id(0) - (programs - helpers)
    return Shares(size, aligned, gl.where(helper < 0, -1, helper * size))


@gluon.jit
def next_part(shares, heads, call, c):
    """(block of rows, which of its ``heads`` items, Part, whether there is one; Shares after it)."""
    i, tiles = _tiles(call, c)
    size = shares.size
    helper = gl.program_id(0) - call.batch_size * call.row_blocks * heads
    widths = _widths(tiles, size, shares.aligned)
    owns = helper < 0
    block = gl.program_id(0) // heads
    if not owns:  # the last block that begins at the cursor or before
        beyond = call.batch_size * call.row_blocks + 1
        block = gl.to_tensor(0)
        while beyond - block > 1:
            middle = (block + beyond) // 2
            here = _before(middle, i, widths) * heads <= shares.cursor
            block = gl.where(here, middle, block)
            beyond = gl.where(here, beyond, middle)
    start = _before(block, i, widths) * heads
    width = gl.sum(gl.where(i == block, widths, 0), 0)
    tiles_here = gl.sum(gl.where(i == block, tiles, 0), 0)
    head = gl.where(owns, gl.program_id(0) % heads, (shares.cursor - start) // gl.maximum(width, 1))
    start += head * width
    lead = gl.where(shares.aligned > 0, 0, LEAD)
    rest = tiles_here - size
    first = (start + lead) // size  # the programs that have parts of it
    last = (start + lead + rest - 1) // size
    parts = gl.where(rest > 0, 2 + last - first, 1)
    begin = size + gl.maximum(shares.cursor - start - lead, 0)
    end = size + gl.minimum((helper + 1) * size - start - lead, rest)
    begin = gl.where(owns, 0, begin)
    end = gl.where(owns, gl.minimum(size, tiles_here), end)
    there = (shares.cursor != NOTHING) & (begin < end)
    cursor = gl.where(owns, NOTHING, start + width)
    cursor = gl.where(cursor < (helper + 1) * size, cursor, NOTHING)
    part = Part(
        begin, end, gl.where(owns, 0, 1 + helper - first), parts, gl.where(shares.aligned > 0, call.patience, 0)
    )  # fmt: skip
    return block, head, part, there, Shares(size, shares.aligned, cursor)
