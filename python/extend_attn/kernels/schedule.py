"""A flat grid over a ragged batch, longest sequences first, without a host that knows the lengths.

Work item ``i`` of the grid becomes (sequence, block of rows) on the device: sequences fall into buckets by the log2 of
their key count (two buckets an octave), items are numbered bucket by bucket from the longest, and inside a sequence
from its last block, which under a causal mask has the most keys. A bucket count costs one pass over the lengths.
"""

from __future__ import annotations

import triton
import triton.language as tl

BUCKETS: tl.constexpr = tl.constexpr(64)  # two an octave up to 2^32 keys
CHUNK: tl.constexpr = tl.constexpr(32)  # sequences looked at in one step


@triton.jit
def _tiles_and_bucket(qo_indptr, kv_indptr, first, batch_size, window, ROWS: tl.constexpr, BLOCK_M: tl.constexpr):
    b = first + tl.arange(0, CHUNK)
    ok = b < batch_size
    extend = (tl.load(qo_indptr + b + 1, mask=ok, other=0) - tl.load(qo_indptr + b, mask=ok, other=0)).to(tl.int32)
    keys = (tl.load(kv_indptr + b + 1, mask=ok, other=0) - tl.load(kv_indptr + b, mask=ok, other=0)).to(tl.int32)
    keys = tl.minimum(keys, window) + extend
    bucket = (2.0 * tl.log2(tl.maximum(keys, 1).to(tl.float32))).to(tl.int32)
    return b, tl.cdiv(extend * ROWS, BLOCK_M), bucket


@triton.jit
def find_item(
    item,
    qo_indptr,
    kv_indptr,
    batch_size,
    window,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """(sequence, block of BLOCK_M rows) of a work item; sequence -1 past the last item. ``ROWS`` rows a token."""
    seq = -1
    block = 0
    if batch_size == 1:  # at run time: as a constant it would double a model's kernels
        extend = (tl.load(qo_indptr + 1) - tl.load(qo_indptr)).to(tl.int32)
        block = tl.cdiv(extend * ROWS, BLOCK_M) - 1 - item
        seq = tl.where(block >= 0, 0, -1)
    else:
        ids = tl.arange(0, BUCKETS)
        count = tl.zeros([BUCKETS], tl.int32)
        for first in tl.range(0, batch_size, CHUNK, num_stages=1):
            b, tiles, bucket = _tiles_and_bucket(qo_indptr, kv_indptr, first, batch_size, window, ROWS, BLOCK_M)
            count += tl.sum(tl.where(bucket[:, None] == ids[None, :], tiles[:, None], 0), 0)
        upto = tl.cumsum(count, 0)
        before = tl.sum(count, 0) - upto  # items of longer buckets
        mine = (before <= item) & (item < before + count)
        my_bucket = tl.max(tl.where(mine, ids, -1), 0)
        offset = item - tl.sum(tl.where(mine, before, 0), 0)
        for first in tl.range(0, batch_size, CHUNK, num_stages=1):
            b, tiles, bucket = _tiles_and_bucket(qo_indptr, kv_indptr, first, batch_size, window, ROWS, BLOCK_M)
            tiles = tl.where(bucket == my_bucket, tiles, 0)
            end = tl.cumsum(tiles, 0)
            here = (end - tiles <= offset) & (offset < end)
            seq = tl.maximum(seq, tl.max(tl.where(here, b, -1), 0))
            block += tl.sum(tl.where(here, end - 1 - offset, 0), 0)
            offset -= tl.sum(tiles, 0)
    return seq, block
