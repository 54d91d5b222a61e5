"""The tiled family for Hopper (prefill, chunks): warp-specialised attention over blocks of new tokens.

A program is two consumer warpgroups of 64 query rows each and a producer; programs are persistent and take work items in
order of falling cost. A consumer walks the key tiles of its rows from the diagonal downwards, then the prefix downwards,
and overlaps the scores of one tile with the products of the tile before: it issues S = Q K(j), then O += P(j-1) V(j-1), and
does the softmax of j while the latter runs. Only tiles at an edge (the diagonal, a sequence's or the prefix's end, the
window's start) are masked, in loops of their own.
"""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..softmax import LN2, LOG2E
from .gluon_compat import constexpr_function, struct
from .ring import Ring, barriers
from .tiled_producer import produce
from .tiled_schedule import FIELDS, MESSAGES, receive
from .tiled_work import ROWS, Call, Shape, place_of, tiles_of

# Where the key tiles of a loop lie, and which are masked.
NEW, POOL, BOTH = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
NONE, END, SOME = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)


@constexpr_function
def output_layout(columns):
    """An accumulator's rows with 8 neighbouring columns a thread: 16-byte stores, reached by shuffles in a warp."""
    registers = [[0, 1], [0, 2], [0, 4], [8, 0]] + [[0, 1 << i] for i in range(5, columns.bit_length() - 1)]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns])


@struct
class Rows:
    """Where a call's rows go, and what turns their dot products into logits (base 2)."""

    o: gl.tensor
    lse: gl.tensor
    partial: gl.tensor
    partial_ml: gl.tensor
    sinks: gl.tensor
    q_positions: gl.tensor
    window_offsets: gl.tensor
    stride_ot: gl.tensor
    stride_oh: gl.tensor
    new_scale: gl.tensor
    pool_scale: gl.tensor
    v_scale: gl.tensor
    logit_cap: gl.tensor
    temperature_len: gl.tensor
    log2_temperature_len: gl.tensor
    OFFSETS: gl.constexpr


@struct
class Memory:
    """Shared memory: query tiles [2 * K_CHUNKS, 64, K_COLUMNS] with a barrier each way, the two rings, and
    the board on which the producer writes work items."""

    q_slots: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_ring: Ring
    v_ring: Ring
    board: Ring


@gluon.jit
def start_scores(WHO: gl.constexpr, memory, n, S: gl.constexpr, c):
    """Issues S = Q K^T of key tile ``n``. Where the ring holds no second tile, each slot is released as soon as it is
    read, except the last."""
    ONE_TILE: gl.constexpr = memory.k_ring.stages == c.K_CHUNKS and c.K_CHUNKS > 1
    acc = gl.zeros([ROWS, c.BLOCK_N], gl.float32, S)
    for chunk in gl.static_range(c.K_CHUNKS):
        at = n * c.K_CHUNKS + chunk
        memory.k_ring.wait_full(at)
        if c.HAS_POOL:
            fence_async_shared()
        q = memory.q_slots.index(WHO * c.K_CHUNKS + chunk)
        acc = warpgroup_mma(q, memory.k_ring.slot(at).permute((1, 0)), acc, use_acc=chunk > 0, is_async=True)
        if ONE_TILE and chunk > 0:
            acc = warpgroup_mma_wait(1, [acc])
            memory.k_ring.release(at - 1)
    return acc


@gluon.jit
def release_keys(memory, n, c):
    """The slots of key tile ``n`` that ``start_scores`` has left."""
    ONE_TILE: gl.constexpr = memory.k_ring.stages == c.K_CHUNKS
    for chunk in gl.static_range(c.K_CHUNKS - 1 if ONE_TILE else 0, c.K_CHUNKS):
        memory.k_ring.release(n * c.K_CHUNKS + chunk)


@gluon.jit
def logits(s, scale, temperature, logit_cap, SCALED: gl.constexpr, c):
    """Dot products to base-2 logits: scale, cap, temperature. Without the last two they stay unscaled unless SCALED."""
    if c.NEGATE:
        s = -s
    if c.CAP:  # scale carries log2(e); tanh wants the natural logit
        e = gl.exp2(gl.abs(s) * (scale * (-2.0 / logit_cap)))
        y = (1.0 - e) / (1.0 + e) * (logit_cap * LOG2E)
        s = gl.where(s < 0, -y, y)
    elif SCALED or c.TEMPERATURE:
        s = s * scale
    if c.TEMPERATURE:
        s = s * temperature[:, None]
    return s


@gluon.jit
def seen(limit, rel, window, S: gl.constexpr, c):
    """Which keys a tile's rows see: row r sees column k if k < limit, if causal k <= r + rel, and r + rel <= k + window
    under a window."""
    k = gl.arange(0, c.BLOCK_N, layout=gl.SliceLayout(0, S))[None, :]
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))[:, None] + rel
    visible = k < limit
    if c.CAUSAL:
        visible = visible & (k <= r)
    if c.WINDOW:
        visible = visible & (k + window >= r)
    return visible


@gluon.jit
def weigh(s, m, l, scale, SCALED: gl.constexpr, c):
    """One step of the online softmax: (p, alpha, m, l). Logits that are not SCALED yet take one fused multiply-add."""
    if SCALED or c.CAP or c.TEMPERATURE:
        m_new = gl.maximum(m, gl.max(s, 1))
        p = gl.exp2(s - m_new[:, None])
    else:
        m_new = gl.maximum(m, gl.max(s, 1) * scale)
        p = gl.exp2(s * scale - m_new[:, None])
    alpha = gl.exp2(m - m_new)
    return p, alpha, m_new, l * alpha + gl.sum(p, 1)


@gluon.jit
def edges(t, tiles, place, item, window, KEYS: gl.constexpr, S: gl.constexpr, c):
    """``seen`` of tile t, wherever it lies."""
    key = (tiles.new_hi - 1 - t) * c.BLOCK_N
    limit = item.extend_len - key
    rel = place.row0 - key
    if KEYS == BOTH:
        key = (tiles.pool_hi - 1 - (t - tiles.new_tiles)) * c.BLOCK_N
        limit = gl.where(t < tiles.new_tiles, limit, item.prefix_len - key)
        rel = gl.where(t < tiles.new_tiles, rel, place.row0 + item.prefix_len - key)
    return seen(limit, rel, window, S, c)


@gluon.jit
def scales(t, tiles, rows, KEYS: gl.constexpr):
    """(factor of tile t's dot products, factor of its values)."""
    if KEYS == NEW:
        return rows.new_scale, gl.to_tensor(1.0)
    elif KEYS == POOL:
        return rows.pool_scale, rows.v_scale
    else:
        new = t < tiles.new_tiles
        return gl.where(new, rows.new_scale, rows.pool_scale), gl.where(new, 1.0, rows.v_scale)


@gluon.jit
def walk(
    WHO: gl.constexpr, memory, rows, o, m, l, p, n, first, stop, tiles, place, item, window, temperature,
    KEYS: gl.constexpr, EDGES: gl.constexpr, S: gl.constexpr, O: gl.constexpr, P: gl.constexpr, c,
):  # fmt: skip
    """Folds key tiles ``first``..``stop`` of the item into the state; P of the tile before is still to be used.

    Tile t lies in ring position ``n`` + t. KEYS: NEW, POOL or BOTH. EDGES: NONE of the tiles is masked, the prefix's END
    is, or SOME are as ``place`` says.
    """
    for t in range(first, stop):
        s_acc = start_scores(WHO, memory, n + t, S, c)
        memory.v_ring.wait_full(n + t - 1)
        if c.HAS_POOL:
            fence_async_shared()
        o_acc = warpgroup_mma(p, memory.v_ring.slot(n + t - 1), o, is_async=True)
        scale, v_scale = scales(t, tiles, rows, KEYS)
        s = warpgroup_mma_wait(1, [s_acc])
        release_keys(memory, n + t, c)
        s = logits(s, scale, temperature, rows.logit_cap, EDGES != NONE, c)
        if EDGES == END:
            k = gl.arange(0, c.BLOCK_N, layout=gl.SliceLayout(0, S))
            s = gl.where((k < item.prefix_len % c.BLOCK_N)[None, :], s, float("-inf"))
        elif EDGES == SOME:
            whole = (t < place.stop_new) | ((t >= place.start_pool) & (t < place.stop_pool))
            if not whole:
                s = gl.where(edges(t, tiles, place, item, window, KEYS, S, c), s, float("-inf"))
        w, alpha, m, l = weigh(s, m, l, scale, EDGES != NONE, c)
        if c.V_SCALED and KEYS != NEW:
            w = w * v_scale
        p_next = gl.convert_layout(w.to(memory.q_slots.dtype), P)
        o, used = warpgroup_mma_wait(0, [o_acc, p])
        memory.v_ring.release(n + t - 1)
        o = o * gl.convert_layout(alpha, gl.SliceLayout(1, O))[:, None]
        p = p_next
    return o, m, l, p


@gluon.jit
def temperature_of(rows, item, row0, S: gl.constexpr, c):
    """xAI's factor a row: log2(position) / log2(length) past that length, 1 before."""
    factor = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(1, S))
    if c.TEMPERATURE:
        token = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
        position = item.prefix_len + token
        if rows.OFFSETS:
            position += gl.load(rows.window_offsets + item.sequence).to(gl.int32)
        if c.Q_POSITIONS:
            position = gl.load(rows.q_positions + item.q_start + token, mask=token < item.extend_len, other=0)
        bent = gl.log2(gl.maximum(position, 1).to(gl.float32)) / rows.log2_temperature_len
        factor = gl.where(position > rows.temperature_len, bent, factor)
    return factor


@gluon.jit
def store(
    WHO: gl.constexpr, memory, rows, item, row0, head, o, m, l, S: gl.constexpr, STAGED: gl.constexpr, c,
):  # fmt: skip
    """Sink, division, output and LSE of a consumer's rows."""
    DIRECT: gl.constexpr = STAGED and rows.o.dtype.element_ty == gl.float32  # the query's place holds 16-bit types
    OUT: gl.constexpr = o.type.layout if DIRECT else output_layout(c.BLOCK_DV)
    TILES: gl.constexpr = 2 * c.K_CHUNKS * c.K_COLUMNS // c.BLOCK_DV
    if c.SINKS:
        sink = gl.load(rows.sinks + head).to(gl.float32) * LOG2E
        m_new = gl.maximum(m, sink)
        alpha = gl.exp2(m - m_new)
        l = l * alpha + gl.exp2(sink - m_new)
        o = o * gl.convert_layout(alpha, gl.SliceLayout(1, o.type.layout))[:, None]
        m = m_new
    if c.LSE:
        if item.v_slice == 0:
            token = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
            at = (item.q_start + token).to(gl.int64) * c.NUM_HEADS + head
            gl.store(rows.lse + at, (m + gl.log2(l)) * LN2, mask=token < item.extend_len)
    o = o * gl.convert_layout(1.0 / l, gl.SliceLayout(1, o.type.layout))[:, None]
    if DIRECT:
        out = o
    elif STAGED:
        V_LAYOUT: gl.constexpr = memory.v_ring.slots.layout
        tile = memory.q_slots._reinterpret(memory.q_slots.dtype, [TILES, ROWS, c.BLOCK_DV], V_LAYOUT).index(WHO * (TILES // 2))
        tile.store(o.to(memory.q_slots.dtype))
        out = tile.load(OUT).to(rows.o.dtype.element_ty)
    else:
        out = gl.convert_layout(o.to(rows.o.dtype.element_ty), OUT)
    token = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    column = item.v_slice * c.BLOCK_DV + gl.arange(0, c.BLOCK_DV, layout=gl.SliceLayout(0, OUT))
    base = rows.o + head.to(gl.int64) * rows.stride_oh
    pointers = base + ((item.q_start + token).to(gl.int64) * rows.stride_ot)[:, None] + column[None, :]
    pointers = gl.max_contiguous(gl.multiple_of(pointers, [1, 16]), [1, 8])
    gl.store(pointers, out, mask=(token < item.extend_len)[:, None] & (column < c.HEAD_DIM_V)[None, :])


@gluon.jit
def store_part(rows, call, item, tiles, row0, head, o, m, l, S: gl.constexpr, c):
    """A split's accumulator, maxima and sums, as kernels/combine.py reads them: tiles of 64 tokens of one head."""
    block = item.block * (c.TOKENS // ROWS) + (row0 - item.first) // ROWS
    tile = (item.sequence * call.row_blocks * (c.TOKENS // ROWS) + block) * c.NUM_HEADS + head
    slot = (tile * call.splits + item.split).to(gl.int64)
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    if item.v_slice == 0:
        gl.store(rows.partial_ml + slot * (2 * ROWS) + r, m)
        gl.store(rows.partial_ml + slot * (2 * ROWS) + ROWS + r, l)
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, o.type.layout))
    column = item.v_slice * c.BLOCK_DV + gl.arange(0, c.BLOCK_DV, layout=gl.SliceLayout(0, o.type.layout))
    DV: gl.constexpr = c.BLOCK_DV * c.V_SLICES
    ok = (row0 + r < item.extend_len) & (tiles.begin < tiles.end)
    pointers = rows.partial + (slot * ROWS + r)[:, None] * DV + column[None, :]
    gl.store(pointers, o, mask=ok[:, None] & (column < DV)[None, :])


@gluon.jit
def consume(WHO: gl.constexpr, rows, call, c, memory):
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, c.BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, c.BLOCK_DV, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    CAN_SKIP: gl.constexpr = WHO == 0 and c.CAUSAL and c.TOKENS > c.BLOCK_N
    ALL: gl.constexpr = BOTH if c.HAS_POOL else NEW
    FIRST: gl.constexpr = ALL if c.SPLIT else NEW
    STAGED: gl.constexpr = c.V_SLICES > 1  # no shared memory is left to change the output's layout but the query's
    n = 0
    number = 0
    turn = 0
    item = receive(memory.board, turn, call, c)
    while item.extend_len != 0:
        tiles = tiles_of(item, call, c)
        row0 = item.first
        head = item.head_block * c.HEADS
        if c.HEADS == 2:
            head += WHO
        else:
            row0 += WHO * ROWS
        m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
        l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
        o = gl.zeros([ROWS, c.BLOCK_DV], gl.float32, O)
        if (not c.SPLIT) or tiles.begin < tiles.end:
            place = place_of(item, tiles, row0, call, c)
            temperature = temperature_of(rows, item, row0, S, c)
            n -= tiles.begin  # tile t lies in ring position n + t
            first = place.begin
            mbarrier.wait(memory.q_full.index(WHO), number & 1)
            if CAN_SKIP:  # the other consumer's diagonal tile
                if tiles.begin < first:
                    for chunk in gl.static_range(c.K_CHUNKS):
                        memory.k_ring.wait_full((n + tiles.begin) * c.K_CHUNKS + chunk)
                        memory.k_ring.release((n + tiles.begin) * c.K_CHUNKS + chunk)
            s = warpgroup_mma_wait(0, [start_scores(WHO, memory, n + first, S, c)])
            release_keys(memory, n + first, c)
            scale, v_scale = scales(first, tiles, rows, FIRST)
            s = logits(s, scale, temperature, rows.logit_cap, True, c)
            s = gl.where(edges(first, tiles, place, item, call.window, FIRST, S, c), s, float("-inf"))
            w, alpha, m, l = weigh(s, m, l, scale, True, c)
            if c.V_SCALED and c.SPLIT:
                w = w * v_scale
            p = gl.convert_layout(w.to(memory.q_slots.dtype), P)
            if CAN_SKIP:
                if tiles.begin < first:
                    memory.v_ring.wait_full(n + tiles.begin)
                    memory.v_ring.release(n + tiles.begin)
            if c.WINDOW:
                o, m, l, p = walk(
                    WHO, memory, rows, o, m, l, p, n, first + 1, tiles.end, tiles, place, item, call.window,
                    temperature, ALL, SOME, S, O, P, c,
                )  # fmt: skip
            else:
                stop_new = tiles.end
                if c.HAS_POOL:
                    stop_new = gl.minimum(tiles.new_tiles, tiles.end)
                o, m, l, p = walk(
                    WHO, memory, rows, o, m, l, p, n, first + 1, stop_new, tiles, place, item, call.window,
                    temperature, NEW, NONE, S, O, P, c,
                )  # fmt: skip
                if c.HAS_POOL:
                    o, m, l, p = walk(
                        WHO, memory, rows, o, m, l, p, n, gl.maximum(tiles.new_tiles, first + 1),
                        gl.minimum(place.start_pool, tiles.end), tiles, place, item, call.window, temperature,
                        POOL, END, S, O, P, c,
                    )  # fmt: skip
                    o, m, l, p = walk(
                        WHO, memory, rows, o, m, l, p, n, gl.maximum(place.start_pool, first + 1), tiles.end,
                        tiles, place, item, call.window, temperature, POOL, NONE, S, O, P, c,
                    )  # fmt: skip
            if not STAGED:
                mbarrier.arrive(memory.q_empty.index(WHO), count=1)
            n += tiles.end
            memory.v_ring.wait_full(n - 1)
            if c.HAS_POOL:
                fence_async_shared()
            o_acc = warpgroup_mma(p, memory.v_ring.slot(n - 1), o, is_async=True)
            o, used = warpgroup_mma_wait(0, [o_acc, p])
            memory.v_ring.release(n - 1)
            number += 1
        if c.SPLIT:
            store_part(rows, call, item, tiles, row0, head, o, m, l, S, c)
        else:
            store(WHO, memory, rows, item, row0, head, o, m, l, S, STAGED, c)
        if STAGED:
            if (not c.SPLIT) or tiles.begin < tiles.end:
                fence_async_shared()
                mbarrier.arrive(memory.q_empty.index(WHO), count=1)
        turn += 1
        item = receive(memory.board, turn, call, c)


UNSPECIALIZED = [
    "batch_size", "row_blocks", "splits", "window", "new_scale", "pool_scale", "v_scale", "logit_cap",
    "temperature_len", "log2_temperature_len", "stride_ks", "stride_kg", "stride_vs", "stride_vg", "stride_ot",
    "stride_oh",
]  # fmt: skip
UNALIGNED = ["qo_indptr", "kv_indptr", "kv_indices", "sinks", "window_offsets", "q_positions", "lse"]


@gluon.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def tiled_kernel(
    q_desc, k_desc, v_desc, k_pool, v_pool, o, lse, qo_indptr, kv_indptr, kv_indices, sinks, window_offsets,
    q_positions, partial, partial_ml, stride_ks, stride_kg, stride_vs, stride_vg, stride_ot, stride_oh, batch_size, row_blocks, splits,
    window, new_scale, pool_scale, v_scale, logit_cap, temperature_len, log2_temperature_len,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr, BLOCK_N: gl.constexpr, K_COLUMNS: gl.constexpr, K_CHUNKS: gl.constexpr,
    BLOCK_DV: gl.constexpr, V_SLICES: gl.constexpr, HAS_POOL: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, SINKS: gl.constexpr, CAP: gl.constexpr, TEMPERATURE: gl.constexpr,
    Q_POSITIONS: gl.constexpr, LSE: gl.constexpr, V_SCALED: gl.constexpr, NEGATE: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, PRODUCER_WARPS: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Descriptors are ragged (tiled_producer.py); tensors as in ``Inputs``; numbers in the order of recipe.scalars."""
    ARRIVALS: gl.constexpr = 128 if HAS_POOL else 1  # a gathered slot is filled by all threads of the producer
    c = Shape(
        NUM_HEADS, GROUP, HEADS, HEAD_DIM, HEAD_DIM_V, BLOCK_N, K_COLUMNS, K_CHUNKS, BLOCK_DV, V_SLICES,
        HAS_POOL, CAUSAL, WINDOW, SINKS, CAP, TEMPERATURE, Q_POSITIONS, LSE, V_SCALED, NEGATE, SPLIT,
        ROWS if HEADS == 2 else 2 * ROWS, NUM_HEADS // HEADS,
    )  # fmt: skip
    call = Call(
        qo_indptr, kv_indptr, gl.to_tensor(batch_size), gl.to_tensor(row_blocks), gl.to_tensor(splits),
        gl.to_tensor(window),
    )  # fmt: skip
    rows = Rows(
        o, lse if LSE else o, partial if SPLIT else o, partial_ml if SPLIT else o, sinks if SINKS else o, q_positions if Q_POSITIONS else o,
        window_offsets if window_offsets is not None else o, gl.to_tensor(stride_ot), gl.to_tensor(stride_oh),
        gl.to_tensor(new_scale), gl.to_tensor(pool_scale), gl.to_tensor(v_scale), gl.to_tensor(logit_cap),
        gl.to_tensor(temperature_len), gl.to_tensor(log2_temperature_len), window_offsets is not None,
    )  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, K_COLUMNS], dtype)
    K_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, K_COLUMNS], dtype)
    V_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_DV], dtype)
    memory = Memory(
        gl.allocate_shared_memory(dtype, [2 * K_CHUNKS, ROWS, K_COLUMNS], Q_LAYOUT),
        barriers(2, 1),
        barriers(2, 1),
        Ring(
            gl.allocate_shared_memory(dtype, [K_STAGES, BLOCK_N, K_COLUMNS], K_LAYOUT),
            barriers(K_STAGES, ARRIVALS), barriers(K_STAGES, 2), K_STAGES,
        ),
        Ring(
            gl.allocate_shared_memory(dtype, [V_STAGES, BLOCK_N, BLOCK_DV], V_LAYOUT),
            barriers(V_STAGES, ARRIVALS), barriers(V_STAGES, 2), V_STAGES,
        ),
        Ring(
            gl.allocate_shared_memory(gl.int32, [MESSAGES * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
            barriers(MESSAGES, 1), barriers(MESSAGES, 2), MESSAGES,
        ),
    )  # fmt: skip
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (0, rows, call, c, memory)),
            (consume, (1, rows, call, c, memory)),
            (
                produce,
                (
                    q_desc, k_desc, v_desc, k_pool, v_pool, kv_indices, gl.to_tensor(stride_ks), gl.to_tensor(stride_kg),
                    gl.to_tensor(stride_vs), gl.to_tensor(stride_vg), call, c, memory.q_slots, memory.q_full,
                    memory.q_empty, memory.k_ring, memory.v_ring, memory.board, ARRIVALS,
                ),
            ),
        ],
        [4, PRODUCER_WARPS],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
