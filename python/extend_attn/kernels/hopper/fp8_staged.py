"""Rows of an fp8 pool on their way through shared memory: copied as codes, tiles ahead, then converted into the ring.

Copies are asynchronous and hold no registers, so that several tiles are on their way while one is converted. Codes lie
in panels of 64 columns, each all rows high, as the 16-bit values do in a slot of the ring: a piece of one becomes a
piece of the other.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .addresses import rows_at
from .fp8_rows import to_pairs
from .gluon_compat import constexpr_function, gather_load, reinterpret

PANEL = gl.constexpr(64)  # columns: 64 bytes of codes, 128 of values
# That a warpgroup converts at once, 32 words a thread: with half of it fp8_extend_pref takes 320 us on an H200, 315 so,
# fp8_verify_full8k 165 and 161.
PIECE_CODES = gl.constexpr(16384)


@constexpr_function
def copy_layout(rows, words, warps):
    """Words of four codes, four a thread; as many threads as a row has such words take it whole."""
    across = [[0, 4 << i] for i in range((words // 4).bit_length() - 1)]
    down = [[1 << i, 0] for i in range(rows.bit_length() - 1)]
    lanes = (across[:2] + down[:1] + across[2:] + down[1:])[:5]
    used = len(lanes) - len(across)
    warp = down[used : used + warps.bit_length() - 1]
    registers = [[0, 1], [0, 2]] + down[used + len(warp) :]
    return gl.DistributedLinearLayout(registers, lanes, warp, [], [rows, words])


@gluon.jit
def stage(place, pool, slots, stride, exists, LIMIT: gl.constexpr, HIDDEN: gl.constexpr, LAYOUT: gl.constexpr):
    """Enqueues copies of the pool's rows at these slots; zeros from column LIMIT on, and, if HIDDEN, for rows that do
    not exist."""
    words = gl.arange(0, place.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    rows = rows_at(pool, slots, stride).to(gl.pointer_type(gl.int32), bitcast=True)
    pointers = rows[:, None] + words[None, :]
    pointers = gl.max_contiguous(gl.multiple_of(pointers, [1, 16]), [1, 4])
    if HIDDEN:
        gather_load(place, pointers, mask=exists[:, None] & (words < LIMIT // 4)[None, :])
    elif LIMIT < place.shape[1] * 4:
        gather_load(place, pointers, mask=(words < LIMIT // 4)[None, :])
    else:
        gather_load(place, pointers)


@gluon.jit
def convert(place, slot, FIRST: gl.constexpr, KIND: gl.constexpr, HALF: gl.constexpr):
    """Codes from column FIRST on into a slot of the ring, about PIECE_CODES at a time. Gluon puts a barrier between
    stores: a piece's codes are loaded before the one before is stored."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [gl.num_warps(), 1], [1, 0])
    ROWS: gl.constexpr = slot.shape[0]
    PIECE: gl.constexpr = min(slot.shape[1], max(PANEL, PIECE_CODES // ROWS))  # columns
    PIECES: gl.constexpr = slot.shape[1] // PIECE
    ALL: gl.constexpr = place.shape[1] * 4 // PIECE
    codes = reinterpret(place, gl.int32, [ALL, ROWS, PIECE // 4], gl.NVMMASharedLayout(64, 32, 2))
    values = reinterpret(slot, gl.int32, [PIECES, ROWS, PIECE // 2], gl.NVMMASharedLayout(128, 32, 2))
    following = codes.index(FIRST // PIECE).load(LAYOUT)
    for piece in gl.static_range(PIECES):
        words = following
        if piece + 1 < PIECES:
            following = codes.index(FIRST // PIECE + piece + 1).load(LAYOUT)
        values.index(piece).store(to_pairs(words, KIND, HALF, True))
