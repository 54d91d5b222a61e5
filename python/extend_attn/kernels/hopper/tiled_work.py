"""What the tiled Hopper kernel works on: a call, its compile-time shape, work items and their key tiles."""

# No `from __future__ import annotations`: an aggregate's fields are checked against the annotations themselves.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from .gluon_compat import struct
from .ring import Ring

ROWS: gl.constexpr = gl.constexpr(64)  # query rows of a consumer: one warpgroup product is that high
MIN_TILES: gl.constexpr = gl.constexpr(5)  # key tiles of a part: shorter ones cost more than they save


@struct
class Shape:
    """Compile-time facts. A key tile is BLOCK_N keys in K_CHUNKS slots of K_COLUMNS columns, and one slot of values.

    HEADS 2: two CONSUMERS take two query heads of one KV head over the same 64 tokens; 1: each takes a block of 64
    tokens of one head; either way an item has TOKENS tokens. V_SLICES: work items that share a head's value
    columns, or, if LATENT, where values are the first columns of keys, consumers (tiled_latent.py); APART: those of
    new tokens are not. QUERIES: query tiles a consumer, this item's and the next one's if there are two. ONE_RING:
    keys and values share a ring. STAGED: the output leaves through the query's place. SPLIT: an item's keys are cut
    into parts. PDL: the kernel ahead may still run. GATHERED: the prefixes' rows follow one another, copied ahead or,
    BESIDE, by this kernel. GATHERS: rows come by asynchronous copies, which consumers must fence off, or, with RUNS, by
    TMA. FP8: 0, or what fp8_rows.py calls the pool's codes. BY_POSITION: the window goes by ``q_positions``. SLACK: of
    weigh, but for a walk's first tiles. PAIRED: see rounded. UNSEEN: a row may see no key of an item. S, O, P: the
    layouts of a consumer's logits, accumulator, weights.
    """

    CONSUMERS: gl.constexpr
    NUM_HEADS: gl.constexpr
    GROUP: gl.constexpr
    HEADS: gl.constexpr
    HEAD_BLOCKS: gl.constexpr
    TOKENS: gl.constexpr
    HEAD_DIM: gl.constexpr
    HEAD_DIM_V: gl.constexpr
    BLOCK_N: gl.constexpr
    K_COLUMNS: gl.constexpr
    K_CHUNKS: gl.constexpr
    BLOCK_DV: gl.constexpr
    V_SLICES: gl.constexpr
    QUERIES: gl.constexpr
    ONE_RING: gl.constexpr
    STAGED: gl.constexpr
    LATENT: gl.constexpr
    APART: gl.constexpr
    SPLIT: gl.constexpr
    PDL: gl.constexpr
    HAS_POOL: gl.constexpr
    GATHERED: gl.constexpr
    BESIDE: gl.constexpr
    GATHERS: gl.constexpr
    UNIFIED: gl.constexpr
    FP8: gl.constexpr
    RUNS: gl.constexpr
    CAUSAL: gl.constexpr
    WINDOW: gl.constexpr
    MASK: gl.constexpr
    MASK_PREFIX: gl.constexpr
    SINKS: gl.constexpr
    CAP: gl.constexpr
    TEMPERATURE: gl.constexpr
    Q_POSITIONS: gl.constexpr
    BY_POSITION: gl.constexpr
    UNSEEN: gl.constexpr
    OFFSETS: gl.constexpr
    LSE: gl.constexpr
    V_SCALED: gl.constexpr
    NEGATE: gl.constexpr
    SLACK: gl.constexpr
    PAIRED: gl.constexpr
    S: gl.constexpr
    O: gl.constexpr
    P: gl.constexpr


@struct
class Call:
    """A call's arrays and numbers as in ``Inputs`` and recipe.scalars; ``row_blocks`` of TOKENS tokens a sequence at
    most; ``arrivals`` and ``patience`` as in merge.py."""

    o_desc: tma.tensor_descriptor
    o: gl.tensor
    lse: gl.tensor
    partial: gl.tensor
    partial_ml: gl.tensor
    arrivals: gl.tensor
    patience: gl.tensor
    qo_indptr: gl.tensor
    kv_indptr: gl.tensor
    prefix_lens: gl.tensor
    custom_mask: gl.tensor
    mask_indptr: gl.tensor
    sinks: gl.tensor
    window_offsets: gl.tensor
    q_positions: gl.tensor
    stride_ot: gl.tensor
    stride_oh: gl.tensor
    batch_size: gl.tensor
    row_blocks: gl.tensor
    splits: gl.tensor
    sections: gl.tensor
    window: gl.tensor
    new_scale: gl.tensor
    pool_scale: gl.tensor
    v_scale: gl.tensor
    logit_cap: gl.tensor
    temperature_len: gl.tensor
    log2_temperature_len: gl.tensor


@struct
class Memory:
    """Shared memory: query tiles [CONSUMERS * K_CHUNKS, 64, K_COLUMNS] with barriers both ways, a ring of key tiles
    and one of value tiles, the pool ``slots`` [2, BLOCK_N] of a tile and of the one before, and the board on which the
    producer writes work items (tiled_schedule.py). If LATENT: one query tile in K_CHUNKS and ``q_rest``, what is left
    of keys in place of values, and what the consumers tell each other: ``weights`` [2, 64, keys], ``maxima`` and
    ``sums`` [2, 64], with barriers ``told``."""

    q_slots: gl.shared_memory_descriptor
    q_rest: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_ring: Ring
    v_ring: Ring
    slots: gl.shared_memory_descriptor
    weights: gl.shared_memory_descriptor
    maxima: gl.shared_memory_descriptor
    sums: gl.shared_memory_descriptor
    told: gl.shared_memory_descriptor
    board: Ring


@struct
class Part:
    """Key tiles [begin, end) of an item, part ``number`` of ``parts``."""

    begin: gl.tensor
    end: gl.tensor
    number: gl.tensor
    parts: gl.tensor


@struct
class Item:
    """Tokens ``first``.. of a sequence (TOKENS of them, its block ``block``) for one block of heads.

    ``q_start`` is where the sequence's rows start; ``part``: which keys, where items are SPLIT. An item of a sequence
    without tokens says that there are no more; all others have keys.
    """

    sequence: gl.tensor
    block: gl.tensor
    first: gl.tensor
    q_start: gl.tensor
    extend_len: gl.tensor
    prefix_len: gl.tensor
    head_block: gl.tensor
    v_slice: gl.tensor
    part: Part


@struct
class Tiles:
    """The key tiles that some row of an item sees: new tokens [new_lo, new_hi), prefix [pool_lo, pool_hi).

    Both are walked downwards, new ones first: tile t is new tile ``new_hi`` - 1 - t for t < ``new_tiles``, then prefix
    tile ``pool_hi`` - 1 - (t - ``new_tiles``). The item takes ``begin`` <= t < ``end``, all or its part. ``pool_first``
    is the first prefix key that some row sees.
    """

    new_lo: gl.tensor
    new_hi: gl.tensor
    new_tiles: gl.tensor
    pool_lo: gl.tensor
    pool_hi: gl.tensor
    pool_first: gl.tensor
    begin: gl.tensor
    end: gl.tensor


@struct
class Place:
    """One consumer's walk: its rows start at token ``row0``, its tiles at ``begin``. Every row sees all keys of tiles
    from ``begin`` + 1 to ``stop_new`` and from ``start_pool`` to ``stop_pool``; others are masked."""

    row0: gl.tensor
    begin: gl.tensor
    stop_new: gl.tensor
    start_pool: gl.tensor
    stop_pool: gl.tensor


@gluon.jit
def whole():
    """An item's only part, where nothing is split."""
    return Part(gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(1))


@gluon.jit
def offset_of(item, call, c):
    """The position of the sequence's first key."""
    offset = gl.to_tensor(0)
    if c.OFFSETS:
        offset = gl.load(call.window_offsets + item.sequence).to(gl.int32)
    return offset


@gluon.jit
def positions(item, first, TOKENS: gl.constexpr, call, c):
    """(least, greatest) position of the tokens ``first``.., counted from the sequence's first key; a block may lack
    tokens: the greatest is then no less."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([TOKENS // 32], [32], [gl.num_warps()], [0])
    token = first + gl.arange(0, TOKENS, layout=LAYOUT)
    at = call.q_positions + item.q_start + token
    real = token < item.extend_len
    offset = offset_of(item, call, c)
    least = gl.min(gl.load(at, mask=real, other=0x7FFFFFFF), 0) - offset
    return least, gl.max(gl.load(at, mask=real, other=0), 0) - offset


@gluon.jit
def tiles_of(item, call, c):
    """The Tiles of an item, or of its part."""
    tiles = _all_tiles(item, call, c)
    if c.SPLIT:
        tiles = Tiles(
            tiles.new_lo, tiles.new_hi, tiles.new_tiles, tiles.pool_lo, tiles.pool_hi, tiles.pool_first,
            item.part.begin, item.part.end,
        )  # fmt: skip
    return tiles


@gluon.jit
def equal_part(item, number, call, c):
    """Part ``number`` of the item in parts of one length, up to call.splits; ``number`` may be past the last."""
    tiles = _all_tiles(item, call, c).end
    parts = gl.maximum(gl.minimum(tiles // MIN_TILES, call.splits), 1)
    size = gl.maximum(gl.cdiv(tiles, parts), 1)
    begin = number * size
    return Part(begin, gl.minimum(begin + size, tiles), number, gl.cdiv(tiles, size))


@gluon.jit
def _all_tiles(item, call, c):
    new_lo = gl.to_tensor(0)
    new_hi = gl.cdiv(item.extend_len, c.BLOCK_N)
    if c.CAUSAL:
        new_hi = gl.cdiv(gl.minimum(item.first + c.TOKENS, item.extend_len), c.BLOCK_N)
    pool_first = gl.to_tensor(0)
    if c.BY_POSITION:  # the new tokens' positions are free: any may be seen, none surely
        least, _ = positions(item, item.first, c.TOKENS, call, c)
        pool_first = gl.maximum(least - call.window, 0)
    elif c.WINDOW:
        new_lo = gl.maximum(item.first - call.window, 0) // c.BLOCK_N
        pool_first = gl.maximum(item.prefix_len + item.first - call.window, 0)
    pool_hi = gl.cdiv(item.prefix_len, c.BLOCK_N)
    pool_lo = gl.where(pool_first < item.prefix_len, pool_first // c.BLOCK_N, pool_hi)
    new_tiles = new_hi - new_lo
    end = new_tiles + pool_hi - pool_lo
    return Tiles(new_lo, new_hi, new_tiles, pool_lo, pool_hi, pool_first, gl.to_tensor(0), end)


RAGGED: gl.constexpr = gl.constexpr(1 << 30)  # rows of a ragged descriptor's last-but-two dimension


@struct
class Stretch:
    """Rows of a tensor that belong together: a sequence's new tokens, or its gathered prefix."""

    start: gl.tensor
    length: gl.tensor


@gluon.jit
def new_tokens(item):
    return Stretch(item.q_start, item.extend_len)


@gluon.jit
def box_of(rows, row, head, column):
    """Coordinates in a ragged descriptor of a Stretch's rows from ``row`` on."""
    return [RAGGED, rows.start + rows.length, RAGGED - rows.length + row, head, column]


@gluon.jit
def box_at(item, row, head, column):
    """Coordinates in a ragged descriptor of the item's new tokens from ``row`` on."""
    return box_of(new_tokens(item), row, head, column)


@gluon.jit
def key_place(n, t, tiles, c):
    """Ring position of an item's key tile t, the ``n``-th of the program. ONE_RING holds, item by item, what consumers
    ask for in their order: K of the first tile, then K of a tile and V of the one before, then V of the last."""
    if c.ONE_RING:
        n = 2 * n - (t > tiles.begin).to(gl.int32)
    return n


@gluon.jit
def value_place(n, t, tiles, c):
    if c.ONE_RING:
        n = 2 * n + 1 + (t + 1 < tiles.end).to(gl.int32)
    return n


@gluon.jit
def place_of(item, tiles, row0, call, c):
    skipped = gl.to_tensor(0)
    if c.CAUSAL:  # the diagonal lies in one tile: BLOCK_N >= ROWS
        skipped = gl.maximum(tiles.new_hi - row0 // c.BLOCK_N - 1, 0)
    begin = gl.maximum(tiles.begin, skipped)
    pool_tiles = tiles.pool_hi - tiles.pool_lo
    cut = gl.where((item.prefix_len % c.BLOCK_N != 0) & (pool_tiles > 0), 1, 0)  # the prefix ends inside its last tile
    full_lo = tiles.new_lo
    pool_full_lo = tiles.pool_lo
    if c.BY_POSITION:
        _, greatest = positions(item, row0, ROWS, call, c)
        full_lo = tiles.new_hi
        pool_full_lo = gl.maximum(pool_full_lo, gl.cdiv(gl.maximum(greatest - call.window, 0), c.BLOCK_N))
    elif c.WINDOW:
        edge = row0 + ROWS - 1 - call.window  # the last row sees from here on
        full_lo = gl.maximum(full_lo, gl.cdiv(gl.maximum(edge, 0), c.BLOCK_N))
        pool_full_lo = gl.maximum(pool_full_lo, gl.cdiv(gl.maximum(edge + item.prefix_len, 0), c.BLOCK_N))
    start_pool = tiles.new_tiles + cut
    stop_pool = start_pool + gl.maximum(tiles.pool_hi - cut - pool_full_lo, 0)
    return Place(row0, begin, tiles.new_hi - full_lo, start_pool, stop_pool)
