"""Which work items there are, and who does which: the producer finds them and tells the consumers.

Items are in order of falling cost over the whole batch. An item's *level* is the number of blocks of keys that it
sees; the sequence's last block of rows has the highest. Program p of P takes items p, 2P - 1 - p, 2P + p, ...: rounds
run to and fro, which evens out what the programs get. Lengths are read on the device, so a graph may change them.
Where there are no more items than programs at most, each takes its own, or a part of its own, and nothing is searched.

Where keys and values are more than the L2 holds, heads go in *sections*, one after the other, each with all its items
in this order: what one level of a section has read the next ones find.
"""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..compat import gdc_wait
from .tiled_work import Item, Part, equal_part, whole

CHUNK = gl.constexpr(128)  # sequences looked at in one step
FIELDS = gl.constexpr(16)  # words a message, a power of two
MESSAGES = gl.constexpr(2)


@gluon.jit
def _items_a_block(call, c):
    """Items of a block of rows in one section of the heads."""
    SLICES: gl.constexpr = 1 if c.LATENT else c.V_SLICES
    return c.HEAD_BLOCKS * SLICES // call.sections


@gluon.jit
def _searches(call, c):
    """Whether a program can get a second item; any order will do otherwise."""
    return call.batch_size * call.row_blocks * _items_a_block(call, c) * call.sections > gl.num_programs(0)


@gluon.jit
def _share(place, programs, size):
    """How many of a section's ``size`` items the program in a place gets."""
    rounds = gl.cdiv(size, programs)
    last = gl.where(rounds % 2 == 1, (rounds - 1) * programs + place, rounds * programs - 1 - place)
    return gl.maximum(rounds - (last >= size).to(gl.int32), 0)


@gluon.jit
def item_index(turn, total, call, c):
    """The ``turn``-th item of this program; past the last one's end if there is none."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    size = total * _items_a_block(call, c)
    first = _share(program, programs, size)  # of an even section; in an odd one the programs go the other way
    both = first + _share(programs - 1 - program, programs, size)
    pair = turn // gl.maximum(both, 1)
    turn = turn % gl.maximum(both, 1)
    odd = turn >= first
    place = gl.where(odd, programs - 1 - program, program)
    turn = gl.where(odd, turn - first, turn)
    at = gl.where(turn % 2 == 0, turn * programs + place, (turn + 1) * programs - 1 - place)
    index = (2 * pair + odd.to(gl.int32)) * size + at
    return gl.where(both == 0, size * call.sections, index)


@gluon.jit
def _blocks(start, call, c):
    """(sequence, blocks of rows, blocks of prefix that they all see) of CHUNK sequences from ``start`` on."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([CHUNK // 32], [32], [gl.num_warps()], [0])
    b = start + gl.arange(0, CHUNK, layout=LAYOUT)
    ok = b < call.batch_size
    rows = gl.load(call.qo_indptr + b + 1, mask=ok, other=0) - gl.load(call.qo_indptr + b, mask=ok, other=0)
    blocks = gl.cdiv(rows.to(gl.int32), c.TOKENS)
    before = gl.zeros_like(blocks)
    if c.HAS_POOL:
        if c.UNIFIED:
            before = gl.load(call.prefix_lens + b, mask=ok, other=0).to(gl.int32)
        else:
            stop = gl.load(call.kv_indptr + b + 1, mask=ok, other=0)
            before = (stop - gl.load(call.kv_indptr + b, mask=ok, other=0)).to(gl.int32)
        if c.WINDOW:
            before = gl.minimum(before, call.window)
        before = before // c.TOKENS
    return b, blocks, before


@gluon.jit
def _highest(call, c):
    """The highest level of the batch."""
    highest = 0
    for start in range(0, call.batch_size, CHUNK):
        b, blocks, before = _blocks(start, call, c)
        highest = gl.maximum(highest, gl.max(gl.where(blocks > 0, blocks + before, 0), 0))
    return highest


@gluon.jit
def count_blocks(call, c):
    """Blocks of rows in the whole batch, if any item is to be searched."""
    total = gl.to_tensor(0)
    if _searches(call, c):
        total = _at_least(1, call, c)
    return total


@gluon.jit
def _at_least(level, call, c):
    """How many (sequence, block) pairs have this level or a higher one."""
    found = 0
    for start in range(0, call.batch_size, CHUNK):
        b, blocks, before = _blocks(start, call, c)
        found += gl.sum(gl.minimum(gl.maximum(blocks + before - level + 1, 0), blocks), 0)
    return found


@gluon.jit
def _members_before(sequence, level, call, c):
    """How many sequences before this one have a block of this level."""
    found = 0
    for start in range(0, sequence, CHUNK):
        b, blocks, before = _blocks(start, call, c)
        member = (b < sequence) & (before < level) & (level <= before + blocks)
        found += gl.sum(member.to(gl.int32), 0)
    return found


@gluon.jit
def find_block(rank, total, call, c):
    """(sequence, block) of that rank among all by falling level; ``rank`` < ``total``, which is how many there are."""
    level = 1
    above = _highest(call, c) + 1  # no item is that high
    higher = 0  # items of at least ``above``
    while above - level > 1:
        middle = (level + above) // 2
        found = _at_least(middle, call, c)
        level = gl.where(found > rank, middle, level)
        higher = gl.where(found > rank, higher, found)
        above = gl.where(found > rank, above, middle)
    rank -= higher
    sequence = 0
    beyond = call.batch_size
    while beyond - sequence > 1:
        middle = (sequence + beyond) // 2
        here = _members_before(middle, level, call, c) <= rank
        sequence = gl.where(here, middle, sequence)
        beyond = gl.where(here, beyond, middle)
    return sequence, level - 1


@gluon.jit
def _block_at(place, call):
    """(sequence, block) in that place among all, had every sequence as many."""
    return place // call.row_blocks, place % call.row_blocks


@gluon.jit
def find_item(turn, total, call, c):
    """(the ``turn``-th item of this program, its ``rest``, where its prefix slots start); ``total`` is
    count_blocks'."""
    inner = _items_a_block(call, c)
    part = whole()
    sequence = gl.to_tensor(0)
    block = gl.to_tensor(0)
    rest = gl.to_tensor(0)
    there = turn == 0
    levels = 0  # whether a block is a level, which counts the prefix too
    number = 0
    if c.SPLIT:
        number = gl.program_id(0) % call.splits
        place = gl.program_id(0) // call.splits
        rest = place % inner
        sequence, block = _block_at(place // inner, call)
    elif _searches(call, c):
        index = item_index(turn, total, call, c)
        size = gl.maximum(total * inner, 1)
        section = index // size
        rank = index % size // inner
        rest = section * inner + index % inner
        there = (section < call.sections) & (rank < total)
        if there:
            if call.batch_size == 1:
                block = total - 1 - rank
            else:
                sequence, block = find_block(rank, total, call, c)
                levels = 1
    else:
        inner = inner * call.sections
        rest = gl.program_id(0) % inner
        sequence, block = _block_at(gl.program_id(0) // inner, call)
    kv_start = gl.to_tensor(0).to(gl.int64)
    prefix_len = gl.to_tensor(0)
    q_start = gl.to_tensor(0)
    extend_len = gl.to_tensor(0)
    if there:
        q_start = gl.load(call.qo_indptr + sequence).to(gl.int32)
        extend_len = gl.load(call.qo_indptr + sequence + 1).to(gl.int32) - q_start
        if c.HAS_POOL:
            kv_start = gl.load(call.kv_indptr + sequence).to(gl.int64)
            if c.UNIFIED:
                prefix_len = gl.load(call.prefix_lens + sequence).to(gl.int32)
            else:
                prefix_len = (gl.load(call.kv_indptr + sequence + 1).to(gl.int64) - kv_start).to(gl.int32)
            if levels > 0:
                before = prefix_len
                if c.WINDOW:
                    before = gl.minimum(before, call.window)
                block -= before // c.TOKENS
        extend_len = gl.where(block * c.TOKENS < extend_len, extend_len, 0)
    item = item_of(sequence, block, q_start, extend_len, prefix_len, rest, part, c)
    if c.SPLIT:
        part = equal_part(item, number, call, c)
        extend_len = gl.where(number < part.parts, extend_len, 0)
        item = item_of(sequence, block, q_start, extend_len, prefix_len, rest, part, c)
    return item, rest, kv_start


@gluon.jit
def item_of(sequence, block, q_start, extend_len, prefix_len, rest, part, c):
    """``rest`` counts head blocks and value slices, the last fastest: neighbours read the same keys."""
    SLICES: gl.constexpr = 1 if c.LATENT else c.V_SLICES
    first = block * c.TOKENS
    return Item(
        sequence, block, first, q_start, extend_len, prefix_len, rest // SLICES, rest % SLICES, part
    )  # fmt: skip


@gluon.jit
def _put(board, at, value):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    board.index(at).store(gl.full([1], value, gl.int32, LAYOUT))


@gluon.jit
def _get(board, at):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(board.index(at).load(LAYOUT), 0)


@gluon.jit
def publish(board, item, rest, kv_start, number, c):
    """Tells the consumers the producer's ``number``-th item."""
    board.wait_empty(number)
    at = number % MESSAGES * FIELDS
    _put(board.slots, at, item.sequence)
    _put(board.slots, at + 1, item.block)
    _put(board.slots, at + 2, item.q_start)
    _put(board.slots, at + 3, item.extend_len)
    _put(board.slots, at + 4, item.prefix_len)
    _put(board.slots, at + 5, rest)
    _put(board.slots, at + 6, kv_start.to(gl.int32))
    _put(board.slots, at + 7, (kv_start >> 32).to(gl.int32))
    if c.SPLIT:
        _put(board.slots, at + 8, item.part.begin)
        _put(board.slots, at + 9, item.part.end)
        _put(board.slots, at + 10, item.part.number)
        _put(board.slots, at + 11, item.part.parts)
    mbarrier.arrive(board.filled(number), count=1)


@gluon.jit
def announce(board, turn, total, call, c):
    """Finds the program's ``turn``-th item and tells the consumers: (item, where its prefix slots start)."""
    item, rest, kv_start = find_item(turn, total, call, c)
    publish(board, item, rest, kv_start, turn, c)
    return item, kv_start


@gluon.jit
def announce_first(board, call, c):
    """(what ``announce`` needs of the batch, the program's first item, where its prefix slots start), once the kernel
    ahead has ended."""
    if c.PDL:
        gdc_wait()
    total = count_blocks(call, c)
    item, kv_start = announce(board, 0, total, call, c)
    return total, item, kv_start


@gluon.jit
def search_at(tiles):
    """The step of an item's loop in which the producer finds the next one: the ring is full."""
    return tiles.begin + 1


@gluon.jit
def announced(board, turn, c):
    """(item ``turn``, where its prefix slots start) as the producer told; it reads its own words, and waits for
    nothing."""
    at = turn % MESSAGES * FIELDS
    low = _get(board.slots, at + 6).to(gl.uint32, bitcast=True).to(gl.int64)
    high = _get(board.slots, at + 7).to(gl.int64)
    return _read(board, at, c), (high << 32) + low


@gluon.jit
def receive(board, turn, c):
    """A consumer's ``turn``-th item."""
    board.wait_full(turn)
    item = _read(board, turn % MESSAGES * FIELDS, c)
    board.release(turn)
    return item


@gluon.jit
def _read(board, at, c):
    sequence = _get(board.slots, at)
    block = _get(board.slots, at + 1)
    q_start = _get(board.slots, at + 2)
    extend_len = _get(board.slots, at + 3)
    prefix_len = _get(board.slots, at + 4)
    rest = _get(board.slots, at + 5)
    part = whole()
    if c.SPLIT:
        part = Part(
            _get(board.slots, at + 8), _get(board.slots, at + 9), _get(board.slots, at + 10), _get(board.slots, at + 11)
        )
    return item_of(sequence, block, q_start, extend_len, prefix_len, rest, part, c)
