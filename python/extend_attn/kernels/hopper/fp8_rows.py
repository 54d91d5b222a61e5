"""Codes of an fp8 pool to 16 bits; and the packed kernel's producers where shared memory has no room for codes.

All conversions are exact, and NaN and Inf codes stay what they are. fp16's exponent holds every code: e5m2 is an fp16's
upper byte, e4m3 has an instruction. From there fp32 leads to bf16; or bits alone do, with fewer registers: sign,
exponent and mantissa are shifted into place and multiplied by the power of two that the exponents' biases differ by;
codes that are not finite are found four at a time by a carry into each byte's top bit, which ``prmt`` spreads over the
result.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gather import exists_of, slots_of
from .gluon_compat import constexpr_function, reinterpret
from .shares import next_work

E4M3 = gl.constexpr(1)
E5M2 = gl.constexpr(2)
CHUNK_MAX = gl.constexpr(256)  # columns of a row that are in registers at once

_TO_FP16 = {
    1: """{
        .reg .b16 lo, hi;
        mov.b32 {lo, hi}, $2;
        cvt.rn.f16x2.e4m3x2 $0, lo;
        cvt.rn.f16x2.e4m3x2 $1, hi;
    }""",
    2: """{
        prmt.b32 $0, $2, 0, 0x1404;
        prmt.b32 $1, $2, 0, 0x3424;
    }""",
}


def _to_bf16(shift: int, kept: int, factor: int, carry: int, not_finite: int) -> str:
    return f"""{{
        .reg .b32 t0, t1, u0, u1, c, n, m0, m1;
        mov.b32 c, {factor:#010x};
        prmt.b32 t0, $2, 0, 0x1404;
        prmt.b32 t1, $2, 0, 0x3424;
        shr.u32 u0, t0, {shift};
        shr.u32 u1, t1, {shift};
        and.b32 u0, u0, {kept:#010x};
        and.b32 u1, u1, {kept:#010x};
        lop3.b32 u0, t0, 0x80008000, u0, 0xea;
        lop3.b32 u1, t1, 0x80008000, u1, 0xea;
        mul.rn.bf16x2 u0, u0, c;
        mul.rn.bf16x2 u1, u1, c;
        and.b32 n, $2, 0x7f7f7f7f;
        add.u32 n, n, {carry:#010x};
        prmt.b32 m0, n, 0, 0x9988;
        prmt.b32 m1, n, 0, 0xbbaa;
        lop3.b32 $0, u0, m0, {not_finite:#010x}, 0xf8;
        lop3.b32 $1, u1, m1, {not_finite:#010x}, 0xf8;
    }}"""


_TO_BF16 = {
    1: _to_bf16(4, 0x07F007F0, 0x7B807B80, 0x01010101, 0x7FFF7FFF),  # 2^120; NaN where exponent and mantissa are ones
    2: _to_bf16(3, 0x0FE00FE0, 0x77807780, 0x04040404, 0x7F807F80),  # 2^112; an exponent of ones keeps its mantissa
}


# To fp16, and through fp32 to bf16: eight instructions for four codes, where shifts and masks take fifteen.
_ON_TO_BF16 = """
        .reg .b16 h0, h1, h2, h3;
        .reg .f32 f0, f1, f2, f3;
        mov.b32 {h0, h1}, p0;
        mov.b32 {h2, h3}, p1;
        cvt.f32.f16 f0, h0;
        cvt.f32.f16 f1, h1;
        cvt.f32.f16 f2, h2;
        cvt.f32.f16 f3, h3;
        cvt.rn.bf16x2.f32 $0, f1, f0;
        cvt.rn.bf16x2.f32 $1, f3, f2;
    """


@constexpr_function
def _assembly(kind, half, through_fp32):
    if half or not through_fp32:
        return (_TO_FP16 if half else _TO_BF16)[kind]
    to_fp16 = _TO_FP16[kind].replace("$0", "p0").replace("$1", "p1")
    return "{ .reg .b32 p0, p1;" + to_fp16 + _ON_TO_BF16 + "}"


@gluon.jit
def _load_codes(rows, exists, COLUMN: gl.constexpr, WIDTH: gl.constexpr, DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """Codes of WIDTH columns, four to a 32-bit word: as bytes, each would take a register from load to use."""
    words = COLUMN // 4 + gl.arange(0, WIDTH // 4, layout=gl.SliceLayout(0, LAYOUT))
    pointers = gl.max_contiguous(gl.multiple_of(rows[:, None] + words[None, :], [1, 8]), [1, 2])
    return gl.load(pointers, mask=exists[:, None] & (words < DIM // 4)[None, :], other=0)


@gluon.jit
def to_pairs(words, KIND: gl.constexpr, HALF: gl.constexpr, THROUGH_FP32: gl.constexpr):
    """Words of four codes as twice as many of two values."""
    ASSEMBLY: gl.constexpr = _assembly(KIND, HALF, THROUGH_FP32)
    low, high = gl.inline_asm_elementwise(
        ASSEMBLY, "=r,=r,r", [words], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    return gl.join(low, high).reshape([words.shape[0], words.shape[1] * 2])


@gluon.jit
def _put_codes(slot, words, COLUMN: gl.constexpr, KIND: gl.constexpr, HALF: gl.constexpr):
    """Words of four codes into columns of a slot, as fp16 (HALF) or bf16. Through fp32 would be shorter, but spills
    where a whole tile of codes is in registers."""
    pairs = to_pairs(words, KIND, HALF, False)
    WORDS: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    in_words = reinterpret(slot, gl.int32, [slot.shape[0], slot.shape[1] // 2], WORDS)
    in_words.slice(COLUMN // 2, words.shape[1] * 2, 1).store(pairs)


@gluon.jit
def _put_new(slot, rows, exists, COLUMN: gl.constexpr, WIDTH: gl.constexpr, SKIP: gl.constexpr, DIM: gl.constexpr,
             LAYOUT: gl.constexpr):  # fmt: skip
    """New rows, which are in 16 bits already: columns of the slot from COLUMN on, of the row from SKIP on."""
    columns = SKIP + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    pointers = gl.max_contiguous(gl.multiple_of(rows[:, None] + columns[None, :], [1, 16]), [1, 8])
    values = gl.load(pointers, mask=exists[:, None] & (columns < DIM)[None, :], other=0.0)
    slot.slice(COLUMN, WIDTH, 1).store(values)


@gluon.jit
def produce_new(call, work, shape, ring, pe, n, V: gl.constexpr, WARPS: gl.constexpr):
    """The tiles of new keys (V False) or values of ``work``, behind its pool's; returns the number of what follows."""
    STEP: gl.constexpr = 1 if shape.V_IS_K else 2
    PE: gl.constexpr = 0 if V else shape.BLOCK_PE
    DIM: gl.constexpr = shape.HEAD_DIM_V if V else shape.HEAD_DIM
    CHUNK: gl.constexpr = min(shape.BLOCK_D, CHUNK_MAX)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    if not shape.UNIFIED:
        head = work.kv_head.to(gl.int64)
        if V:
            new = call.v_new + head * call.stride_vh
            stride = call.stride_vt
        else:
            new = call.k_new + head * call.stride_kh
            stride = call.stride_kt
        for i in range(gl.maximum(work.first, work.pool_tiles), work.last):
            place, exists = exists_of(call, work, shape, i, gl.SliceLayout(1, LAYOUT))
            rows = new + (work.q_start + (work.new_lo + place - work.pool_keys)) * stride
            ring.wait_empty(n)
            for c in gl.static_range(shape.BLOCK_D // CHUNK):
                _put_new(ring.slot(n), rows, exists, c * CHUNK, CHUNK, c * CHUNK, DIM, LAYOUT)
            if PE > 0:
                _put_new(pe.index(n // STEP % pe.shape[0]), rows, exists, 0, PE, shape.BLOCK_D, DIM, LAYOUT)
            ring.hand_over(n, 1)
            n += STEP
    return n


@gluon.jit
def produce_fp8(call, shape, share, ring, pe, pairs, num_splits, V: gl.constexpr, WARPS: gl.constexpr):
    """One producer's partition: the K tiles (V False) or the V tiles of the ring; codes are loaded a chunk ahead."""
    STEP: gl.constexpr = 1 if shape.V_IS_K else 2
    PE: gl.constexpr = 0 if V else shape.BLOCK_PE
    DIM: gl.constexpr = shape.HEAD_DIM_V if V else shape.HEAD_DIM
    CHUNK: gl.constexpr = min(shape.BLOCK_D, CHUNK_MAX)
    CHUNKS: gl.constexpr = shape.BLOCK_D // CHUNK
    HALF: gl.constexpr = (shape.V_HALF and V) or call.q.dtype.element_ty == gl.float16
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [WARPS, 1], [1, 0])  # words: 8 codes a thread
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    n = gl.to_tensor(1 if V else 0)
    cursor, sequence, base = share.cursor, share.sequence, share.base
    while cursor < share.end:
        work, begun, cursor, sequence, base = next_work(call, shape, share, cursor, sequence, base, pairs, num_splits)
        head = work.kv_head.to(gl.int64)
        if V:
            pool = call.v_pool.to(gl.pointer_type(gl.int32), bitcast=True) + head * (call.stride_vg // 4)
            stride = call.stride_vs // 4
        else:
            pool = call.k_pool.to(gl.pointer_type(gl.int32), bitcast=True) + head * (call.stride_kg // 4)
            stride = call.stride_ks // 4
        stop = gl.minimum(work.pool_tiles, work.last)
        if work.first < stop:
            slot = slots_of(call, work, shape, work.first, ROWS)
            ahead = slots_of(call, work, shape, work.first + 1, ROWS)
            place, exists = exists_of(call, work, shape, work.first, ROWS)
            codes = _load_codes(pool + slot.to(gl.int64) * stride, exists, 0, CHUNK, DIM, LAYOUT)
            for i in range(work.first, stop):
                later = slots_of(call, work, shape, i + 2, ROWS)
                rows = pool + slot.to(gl.int64) * stride
                for c in gl.static_range(CHUNKS - 1):
                    after = _load_codes(rows, exists, (c + 1) * CHUNK, CHUNK, DIM, LAYOUT)
                    if c == 0:
                        ring.wait_empty(n)
                    _put_codes(ring.slot(n), codes, c * CHUNK, shape.FP8, HALF)
                    codes = after
                if PE > 0:
                    rest = _load_codes(rows, exists, shape.BLOCK_D, PE, DIM, LAYOUT)
                place_next, exists_next = exists_of(call, work, shape, i + 1, ROWS)
                exists_next = exists_next & (i + 1 < stop)
                after = _load_codes(pool + ahead.to(gl.int64) * stride, exists_next, 0, CHUNK, DIM, LAYOUT)
                if CHUNKS == 1:
                    ring.wait_empty(n)
                _put_codes(ring.slot(n), codes, (CHUNKS - 1) * CHUNK, shape.FP8, HALF)
                if PE > 0:
                    _put_codes(pe.index(n // STEP % pe.shape[0]), rest, 0, shape.FP8, HALF)
                ring.hand_over(n, 1)
                n += STEP
                slot = ahead
                ahead = later
                exists = exists_next
                codes = after
        n = produce_new(call, work, shape, ring, pe, n, V, WARPS)
