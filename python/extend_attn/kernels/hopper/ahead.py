"""What a program will read first, asked into the L2 before the kernel ahead of it has ended.

Under programmatic dependent launch a program is there before it may read what the kernel ahead writes. An index array
or a pool row read then may be an old one. But a prefetch is no read: it moves a line into the L2, where the kernel
ahead writes too, so that an old index costs a line of traffic and never a wrong value. All addresses are held within
the tensors, whatever the indices say; the loads that make them bypass L1, where they would leave old lines behind.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _prefetch(pointers, wanted):
    gl.inline_asm_elementwise(
        """{
            .reg .pred p;
            setp.ne.b32 p, $2, 0;
            @p prefetch.global.L2 [$1];
            mov.b32 $0, 0;
        }""",
        "=r,l,r",
        [pointers.to(gl.int64), wanted.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _rows(pool, offsets, wanted, DIM: gl.constexpr, LINES: gl.constexpr, LAYOUT: gl.constexpr):
    """Every 128-byte line of the pool rows at these offsets."""
    SIZE: gl.constexpr = pool.dtype.element_ty.primitive_bitwidth // 8
    columns = gl.arange(0, LINES, layout=gl.SliceLayout(0, LAYOUT)) * (128 // SIZE)
    _prefetch(pool + offsets[:, None] + columns[None, :], wanted[:, None] & (columns < DIM)[None, :])


@gluon.jit
def prefetch_lengths(call, batch_size):
    """Prefetches what even_share reads: where the new tokens and the prefix of every sequence begin."""
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    number = gl.arange(0, 128, layout=FLAT)
    at = number * (128 // (call.qo_indptr.dtype.element_ty.primitive_bitwidth // 8))
    _prefetch(call.qo_indptr + at, at <= batch_size)
    at = number * (128 // (call.kv_indptr.dtype.element_ty.primitive_bitwidth // 8))
    _prefetch(call.kv_indptr + at, at <= batch_size)


@gluon.jit
def look_ahead(call, shape, pairs, num_indices, num_slots):
    """Prefetches the lengths of this program's list, its slots and the rows of its first tile, as far as index arrays
    say already which they are. A list is taken from the prefix alone, and its window from there: a key or two off.

    On an H200, us with none, one and three tiles of rows: verify_chat (34.7 without slots either), 34.0, 34.5;
    gqa3_verify 65.8, 65.2, 65.4, and 66.2 without slots. After splits it costs: one_verify takes 15.1 us with three
    tiles, 13.4 without any of it, since its programs are there a whole kernel early, where they meet its reads.
    """
    SIZE: gl.constexpr = call.k_pool.dtype.element_ty.primitive_bitwidth // 8
    COLUMNS: gl.constexpr = shape.BLOCK_D * (1 if shape.BLOCK_PE == 0 else 2)
    LINES: gl.constexpr = max(1, COLUMNS * SIZE // 128)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [32 // min(LINES, 32), min(LINES, 32)], [gl.num_warps(), 1], [1, 0])
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    INDEX: gl.constexpr = call.kv_indices.dtype.element_ty.primitive_bitwidth // 8
    KEYS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    sequence = gl.program_id(0) // pairs
    head = (gl.program_id(0) % pairs % (shape.NUM_HEADS // shape.GROUP)).to(gl.int64)
    number = gl.arange(0, 128, layout=FLAT)
    _prefetch(call.qo_indptr + sequence + number, number < 2)
    begin = gl.load(call.kv_indptr + sequence, cache_modifier=".cg")
    end = gl.load(call.kv_indptr + sequence + 1, cache_modifier=".cg")
    begin = gl.minimum(gl.maximum(begin, 0), num_indices).to(gl.int32)
    end = gl.minimum(gl.maximum(end, begin), num_indices).to(gl.int32)
    if shape.WINDOW:
        begin = gl.maximum(begin, end - call.window)
    line = begin + number * (128 // INDEX)
    _prefetch(call.kv_indices + line, line < end)
    place = begin + gl.arange(0, shape.BLOCK_N, layout=KEYS)
    slot = gl.load(call.kv_indices + place, mask=place < end, other=-1, cache_modifier=".cg")
    wanted = (slot >= 0) & (slot < num_slots)
    slot = gl.where(wanted, slot, 0).to(gl.int64)
    _rows(call.k_pool, slot * call.stride_ks + head * call.stride_kg, wanted, shape.HEAD_DIM, LINES, LAYOUT)
    if not shape.V_IS_K:
        _rows(call.v_pool, slot * call.stride_vs + head * call.stride_vg, wanted, shape.HEAD_DIM_V, LINES, LAYOUT)
