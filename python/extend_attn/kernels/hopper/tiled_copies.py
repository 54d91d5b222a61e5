"""Prefixes of an fp8 pool converted beside the walk, once a call, by two warps of each program of the tiled kernel.

Many blocks of rows read each prefix. As rows of the query's type, one after the other, they come by TMA, with no slots
to look up and no codes to convert for each block. A *unit* is a tile of keys and values of one KV head. Units are
numbered in the order in which the walk asks for them, and each goes to whichever program has time next: none is left to
one that may not have started, so that no program waits for another that waits for its place.

``ready`` holds the epoch, the units taken, the partitions that have ended, and a word a unit: the epoch in which it was
copied, plus one. The last partition to end begins the next epoch, so that units' words are never set back, and a launch
of other lengths, tiles or programs finds them ready.
"""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..compat import gdc_wait
from .addresses import rows_at
from .fp8_rows import to_pairs
from .gluon_compat import barrier, constexpr_function, reinterpret, struct
from .tiled_gather import in_every_warp

COPY_WARPS = gl.constexpr(2)
SEQUENCES = gl.constexpr(128)  # at most
TAKEN, ENDED, HEADER = gl.constexpr(1), gl.constexpr(2), gl.constexpr(32)
# Words of codes that a thread has on their way: 16 spill in the registers that there are (fp8_extend_pref 241 us on an
# H200, 231 with 8), 4 are too slow (253).
VECTOR, VECTORS = gl.constexpr(4), gl.constexpr(4)


@struct
class Unit:
    """Rows [``first``, ``last``) of a sequence's prefix for one KV head; ``start``: where that prefix begins in the
    list of all indices; ``word``: which of ``ready``'s. ``there``: whether there is such a unit."""

    start: gl.tensor
    first: gl.tensor
    last: gl.tensor
    head: gl.tensor
    word: gl.tensor
    there: gl.tensor


@constexpr_function
def row_layout(words, each, warps):
    """Rows of so many ``words``, by as many threads as take them with ``each``."""
    across = min(32, words // each)
    return gl.BlockedLayout([1, each], [32 // across, across], [warps, 1], [1, 0])


@constexpr_function
def code_words(columns):
    """Words of a row of codes, up to a power of two."""
    return max(VECTOR.value, 1 << (columns // 4 - 1).bit_length())


@gluon.jit
def word_of(sequence, start, tile, head, c):
    """The word of a unit. Prefixes of different sequences begin and end in different tiles of the list of all indices,
    but for those that ``sequence`` tells apart."""
    return HEADER + (start // c.BLOCK_N + sequence + tile) * (c.NUM_HEADS // c.GROUP) + head


@gluon.jit
def level_of(rank, sequences, tiles, ids):
    """(level, sequence) of that ``rank`` among all tiles in order of level, then of sequence, of which each has as many
    levels as ``tiles``; ``ids`` count sequences from 0."""
    level = 0
    above = gl.max(tiles, 0)
    while above - level > 1:
        middle = (level + above) // 2
        here = gl.sum(gl.minimum(tiles, middle), 0) <= rank
        level = gl.where(here, middle, level)
        above = gl.where(here, above, middle)
    rank -= gl.sum(gl.minimum(tiles, level), 0)
    sequence = 0
    beyond = sequences
    while beyond - sequence > 1:
        middle = (sequence + beyond) // 2
        here = gl.sum(((tiles > level) & (ids < middle)).to(gl.int32), 0) <= rank
        sequence = gl.where(here, middle, sequence)
        beyond = gl.where(here, beyond, middle)
    return level, sequence


@gluon.jit
def _tiles(call, ids, c):
    """Tiles of each sequence's prefix, none where nobody reads them."""
    ok = ids < call.batch_size
    rows = gl.load(call.qo_indptr + ids + 1, mask=ok, other=0) - gl.load(call.qo_indptr + ids, mask=ok, other=0)
    keys = gl.load(call.kv_indptr + ids + 1, mask=ok, other=0) - gl.load(call.kv_indptr + ids, mask=ok, other=0)
    return gl.where(rows > 0, gl.cdiv(keys.to(gl.int32), c.BLOCK_N), 0)


@gluon.jit
def _unit(number, tiles, ids, call, c):
    """Unit ``number``: a section of the heads after the other, as the walk goes, then from the prefixes' ends down."""
    HEADS: gl.constexpr = c.NUM_HEADS // c.GROUP
    total = gl.sum(tiles, 0)
    heads = HEADS // call.sections
    there = number < total * HEADS
    number = gl.where(there, number, 0)
    size = gl.maximum(total * heads, 1)
    section = number // size
    number = number % size
    head = section * heads + number % heads
    level, sequence = level_of(number // heads, call.batch_size, tiles, ids)
    start = gl.load(call.kv_indptr + sequence).to(gl.int32)
    length = gl.load(call.kv_indptr + sequence + 1).to(gl.int32) - start
    tile = gl.cdiv(length, c.BLOCK_N) - 1 - level
    first = tile * c.BLOCK_N
    last = gl.minimum(first + c.BLOCK_N, length)
    return Unit(start, first, last, head, word_of(sequence, start, tile, head, c), there)


@gluon.jit
def _lane():
    return gl.arange(0, 32 * gl.num_warps(), layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))


@gluon.jit
def _take(ready):
    """A unit's number, on its way to lane 0: nobody waits for it yet."""
    lane = _lane()
    return gl.atomic_add(ready + TAKEN + lane * 0, gl.full_like(lane, 1), mask=lane == 0, sem="relaxed")


@gluon.jit
def _taken(ticket):
    return gl.max(gl.where(_lane() == 0, ticket, 0), 0)


@gluon.jit
def _slots(kv_indices, unit, c):
    """Pool slots of a unit's rows; past its end they repeat the last."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    row = gl.minimum(unit.first + gl.arange(0, c.BLOCK_N, layout=LANES), unit.last - 1)
    return gl.load(kv_indices + (unit.start + row), mask=(row >= 0) & unit.there, other=0).to(gl.int32)


@gluon.jit
def _copy(pool, stride, stride_head, rows, unit, slots, DIM: gl.constexpr, c):
    """A unit's rows of DIM codes, at ``slots`` in shared memory, to those of ``rows`` [indices, KV heads, DIM]."""
    HEADS: gl.constexpr = c.NUM_HEADS // c.GROUP
    WORDS: gl.constexpr = code_words(DIM)
    SIZE: gl.constexpr = min(c.BLOCK_N, VECTORS * VECTOR * 32 * gl.num_warps() // WORDS)  # rows at a time
    CODES: gl.constexpr = row_layout(WORDS, VECTOR, gl.num_warps())
    VALUES: gl.constexpr = row_layout(WORDS * 2, VECTOR * 2, gl.num_warps())
    pieces = reinterpret(slots, gl.int32, [c.BLOCK_N // SIZE, SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    code = gl.arange(0, WORDS, layout=gl.SliceLayout(0, CODES))
    pair = gl.arange(0, WORDS * 2, layout=gl.SliceLayout(0, VALUES))
    row = unit.first + gl.arange(0, SIZE, layout=gl.SliceLayout(1, VALUES))
    base = pool + unit.head.to(gl.int64) * stride_head
    to = rows + ((unit.start.to(gl.int64) + row) * HEADS + unit.head) * DIM
    for piece in range(gl.cdiv(unit.last - unit.first, SIZE)):
        source = rows_at(base, pieces.index(piece).load(gl.SliceLayout(1, CODES)), stride)
        source = source.to(gl.pointer_type(gl.int32), bitcast=True)[:, None] + code[None, :]
        source = gl.max_contiguous(gl.multiple_of(source, [1, 16]), [1, VECTOR])
        words = gl.load(source, mask=(code < DIM // 4)[None, :], other=0, cache_modifier=".cg")
        values = to_pairs(words, c.FP8, rows.dtype.element_ty == gl.float16, True)
        destination = (to + piece * (SIZE * HEADS * DIM)).to(gl.pointer_type(gl.int32), bitcast=True)
        destination = destination[:, None] + pair[None, :]
        destination = gl.max_contiguous(gl.multiple_of(destination, [1, 16]), [1, VECTOR * 2])
        exists = (row + piece * SIZE < unit.last)[:, None] & (pair < DIM // 2)[None, :]
        gl.store(destination, gl.convert_layout(values, VALUES), mask=exists)


@gluon.jit
def copy_prefixes(sources, call, memory, c):
    """The partition that converts. The unit after this one is taken, and its slots are looked up, meanwhile."""
    if c.PDL:
        gdc_wait()
    epoch = epoch_of(sources.ready)
    ids = gl.arange(0, SEQUENCES, layout=in_every_warp(SEQUENCES, gl.num_warps()))
    tiles = _tiles(call, ids, c)
    unit = _unit(_taken(_take(sources.ready)), tiles, ids, call, c)
    slots = _slots(sources.kv_indices, unit, c)
    ticket = _take(sources.ready)
    while unit.there:
        place = memory.slots.index(0)
        place.store(slots)
        following = _unit(_taken(ticket), tiles, ids, call, c)
        slots = _slots(sources.kv_indices, following, c)
        ticket = _take(sources.ready)
        _copy(sources.k_pool, sources.stride_ks, sources.stride_kg, sources.k_rows, unit, place, c.HEAD_DIM, c)
        _copy(sources.v_pool, sources.stride_vs, sources.stride_vg, sources.v_rows, unit, place, c.HEAD_DIM_V, c)
        barrier()
        gl.atomic_xchg(sources.ready + unit.word, epoch + 1, sem="release")
        unit = following
    leave(sources.ready, epoch)


@gluon.jit
def epoch_of(ready):
    return gl.load(ready, cache_modifier=".cg")  # past L1, which may hold what was there before


@gluon.jit
def await_unit(ready, epoch, word):
    """Until a unit was copied, and TMA sees it."""
    while gl.atomic_add(ready + word, 0, sem="acquire") != epoch + 1:
        pass
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.b32 $0, $1;", "=r,r", [word], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def leave(ready, epoch):
    """One of the two partitions of a program that read the epoch, for the last time."""
    barrier()
    before = gl.atomic_add(ready + ENDED, 1, sem="acq_rel")
    if before == 2 * gl.num_programs(0) - 1:
        gl.atomic_xchg(ready + TAKEN, 0, sem="relaxed")
        gl.atomic_xchg(ready + ENDED, 0, sem="relaxed")
        gl.atomic_xchg(ready, epoch + 1, sem="relaxed")
