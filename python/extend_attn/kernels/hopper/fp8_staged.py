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
PIECE_CODES = gl.constexpr(8192)  # that a warpgroup converts at once: 16 words a thread, and twice as many of values


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


@gluon.jit
def rows_at(pool, slots, stride):
    """Pointers to words of the rows at these slots, ``stride`` bytes apart. A slot and a stride of 32 bits each are
    multiplied as such, by one instruction: as 64 bits they take seven."""
    WORDS: gl.constexpr = gl.pointer_type(gl.int32)
    if stride.dtype == gl.int32:
        addresses = gl.inline_asm_elementwise(
            "mad.wide.u32 $0, $1, $2, $3;", "=l,r,r,l", [slots, stride, pool.to(gl.int64)],
            dtype=gl.int64, is_pure=True, pack=1,
        )  # fmt: skip
        return addresses.to(WORDS, bitcast=True)
    else:
        return (pool + slots.to(gl.int64) * stride).to(WORDS, bitcast=True)


@gluon.jit
def stage(staged, rows, exists, LIMIT: gl.constexpr, HIDDEN: gl.constexpr, LAYOUT: gl.constexpr):
    """Enqueues copies of the rows at these pointers to words; zeros from column LIMIT on, and, if HIDDEN, for rows that
    do not exist."""
    words = gl.arange(0, staged.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    pointers = gl.max_contiguous(gl.multiple_of(rows[:, None] + words[None, :], [1, 16]), [1, 4])
    if HIDDEN:
        gather_load(staged, pointers, mask=exists[:, None] & (words < LIMIT // 4)[None, :])
    elif LIMIT < staged.shape[1] * 4:
        gather_load(staged, pointers, mask=(words < LIMIT // 4)[None, :])
    else:
        gather_load(staged, pointers)


@gluon.jit
def convert(staged, slot, PANEL_FIRST: gl.constexpr, KIND: gl.constexpr, HALF: gl.constexpr):
    """Codes from panel PANEL_FIRST on into a slot of the ring. Gluon puts a barrier between pieces."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [gl.num_warps(), 1], [1, 0])
    ROWS: gl.constexpr = slot.shape[0]
    PIECE: gl.constexpr = PANEL * min(slot.shape[1] // PANEL, max(1, PIECE_CODES // (ROWS * PANEL)))  # columns
    PIECES: gl.constexpr = slot.shape[1] // PIECE
    ALL: gl.constexpr = staged.shape[1] * 4 // PIECE
    FIRST: gl.constexpr = PANEL_FIRST * PANEL // PIECE
    codes = reinterpret(staged, gl.int32, [ALL, ROWS, PIECE // 4], gl.NVMMASharedLayout(64, 32, 2))
    values = reinterpret(slot, gl.int32, [PIECES, ROWS, PIECE // 2], gl.NVMMASharedLayout(128, 32, 2))
    following = codes.index(FIRST).load(LAYOUT)
    for piece in gl.static_range(PIECES):
        words = following
        if piece + 1 < PIECES:
            following = codes.index(FIRST + piece + 1).load(LAYOUT)
        values.index(piece).store(to_pairs(words, KIND, HALF, True))


@gluon.jit
def hand_over(ring, n, ARRIVALS: gl.constexpr):
    """The slot of tile ``n`` is there."""
    fence_async_shared()
    mbarrier.arrive(ring.filled(n), count=ARRIVALS)
