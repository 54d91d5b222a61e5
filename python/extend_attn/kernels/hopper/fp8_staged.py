"""Rows of an fp8 pool on their way through shared memory: copied as codes, tiles ahead, then converted into the ring.

Copies are asynchronous and hold no registers, so that several tiles are on their way while one is converted. Codes lie
in panels of 64 columns, each all rows high, as the 16-bit values do in a slot of the ring: a piece of one becomes a
piece of the other.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .fp8_rows import to_pairs
from .gluon_compat import constexpr_function, gather_load, reinterpret

PANEL = gl.constexpr(64)  # columns: 64 bytes of codes, 128 of values


@constexpr_function
def copy_layout(rows, words, warps):
    """Words of four codes, four a thread. Eight threads of a phase take half a panel's width of two rows, so that they
    write all banks, and as many as a row has words take it whole."""
    across = [[0, 4 << i] for i in range((words // 4).bit_length() - 1)]
    down = [[1 << i, 0] for i in range(rows.bit_length() - 1)]
    lanes = (across[:2] + down[:1] + across[2:] + down[1:])[:5]
    used = len(lanes) - len(across)
    warp = down[used : used + warps.bit_length() - 1]
    registers = [[0, 1], [0, 2]] + down[used + len(warp) :]
    return gl.DistributedLinearLayout(registers, lanes, warp, [], [rows, words])


@constexpr_function
def codes_layout(rows, words, swap):
    """Panels of 16 words, each all rows high. A row's 128 bytes, which come together, lie in two panels: if ``swap``,
    every other panel has its rows in pairs the other way round, so that they do not meet in the same banks."""
    chunk = [[0, 1], [0, 2], [0, 4], [0, 8]]
    down = [[1 << i, 0] for i in range(rows.bit_length() - 1)]
    panels = [[0, 16 << i] for i in range((words // 16).bit_length() - 1)]
    if swap and panels:
        panels[0] = [1, 16]
    return gl.SharedLinearLayout(chunk + down + panels)


@gluon.jit
def _pointers(pool, slots, stride, LAYOUT: gl.constexpr):
    """[rows, words] pointers to the words of rows ``stride`` bytes apart. A slot and a stride of 32 bits each are
    multiplied as such, by one instruction a row: as 64 bits they take seven."""
    WORDS: gl.constexpr = gl.pointer_type(gl.int32)
    words = gl.arange(0, LAYOUT.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    first = pool.to(WORDS, bitcast=True) + words
    if stride.dtype == gl.int32:
        addresses = gl.inline_asm_elementwise(
            "mad.wide.u32 $0, $1, $2, $3;", "=l,r,r,l", [slots[:, None], stride, first.to(gl.int64)[None, :]],
            dtype=gl.int64, is_pure=True, pack=1,
        )  # fmt: skip
        pointers = addresses.to(WORDS, bitcast=True)
    else:
        pointers = first[None, :] + (slots.to(gl.int64) * (stride // 4))[:, None]
    return gl.max_contiguous(gl.multiple_of(pointers, [1, 16]), [1, 4])


@gluon.jit
def stage(
    place, pool, slots, stride, exists, LIMIT: gl.constexpr, HIDDEN: gl.constexpr, SWAP: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Enqueues copies of the pool's rows at these slots; zeros from column LIMIT on, and, if HIDDEN, for rows that do
    not exist."""
    CODES: gl.constexpr = codes_layout(place.shape[0], place.shape[1], SWAP)
    here = reinterpret(place, gl.int32, place.shape, CODES)
    pointers = _pointers(pool, slots, stride, LAYOUT)
    words = gl.arange(0, place.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    if HIDDEN:
        gather_load(here, pointers, mask=exists[:, None] & (words < LIMIT // 4)[None, :])
    elif LIMIT < place.shape[1] * 4:
        gather_load(here, pointers, mask=(words < LIMIT // 4)[None, :])
    else:
        gather_load(here, pointers)


@gluon.jit
def convert(
    place, slot, FIRST: gl.constexpr, PIECE_CODES: gl.constexpr, SWAP: gl.constexpr, KIND: gl.constexpr,
    HALF: gl.constexpr,
):  # fmt: skip
    """Codes from column FIRST on into a slot of the ring, about PIECE_CODES at a time. Gluon puts a barrier between
    stores: a piece's codes are loaded before the one before is stored."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [gl.num_warps(), 1], [1, 0])
    ROWS: gl.constexpr = slot.shape[0]
    LEAST: gl.constexpr = 2 * PANEL if SWAP and slot.shape[1] > PANEL else PANEL
    PIECE: gl.constexpr = min(slot.shape[1], max(LEAST, PIECE_CODES // ROWS))  # columns
    PIECES: gl.constexpr = slot.shape[1] // PIECE
    ALL: gl.constexpr = place.shape[1] * 4 // PIECE
    CODES: gl.constexpr = codes_layout(ROWS, PIECE // 4, SWAP)
    codes = reinterpret(place, gl.int32, [ALL, ROWS, PIECE // 4], gl.NVMMASharedLayout(64, 32, 2))
    values = reinterpret(slot, gl.int32, [PIECES, ROWS, PIECE // 2], gl.NVMMASharedLayout(128, 32, 2))
    following = reinterpret(codes.index(FIRST // PIECE), gl.int32, [ROWS, PIECE // 4], CODES).load(LAYOUT)
    for piece in gl.static_range(PIECES):
        words = following
        if piece + 1 < PIECES:
            after = codes.index(FIRST // PIECE + piece + 1)
            following = reinterpret(after, gl.int32, [ROWS, PIECE // 4], CODES).load(LAYOUT)
        values.index(piece).store(to_pairs(words, KIND, HALF, True))


@gluon.jit
def hand_over(ring, n, ARRIVALS: gl.constexpr):
    """The slot of tile ``n`` is there."""
    fence_async_shared()
    mbarrier.arrive(ring.filled(n), count=ARRIVALS)
