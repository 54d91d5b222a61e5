"""The packed kernel for Hopper: decode and verification at the memory's speed, at page size 1.

One program holds the packed rows of a sequence and KV head (new tokens x heads of the group, 8 to 64) against its key
list, or a share of it; many rows are shared by two consumers. Operands are swapped: S^T = K Q^T and O^T = V^T P^T, so
that warpgroup products, 64 high, run over keys and value columns, and the few rows are their narrow side. K and V go
from the ring straight to the tensor cores; only Q and P take shared memory beside it.

    producer warps    rows gathered by asynchronous copies (gather.py), or converted from fp8 (packed_fp8.py)
      -> ring         K and V tiles in turn
    consumers         S^T, mask, softmax, P to shared memory, O^T; at the end the result, or a split's part of it

Programs that share a list merge their parts at the end of the same launch (merge.py).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .addresses import fresh
from .ahead import look_ahead, prefetch_lengths
from .epilogue import store_result
from .fp8_rows import produce_fp8
from .gather import produce
from .gluon_compat import reinterpret
from .merge import finish_pair
from .packed_fp8 import produce_staged
from .packed_masks import rows_see, whole_places
from .packed_work import Call, Shape
from .ring import Ring, barriers
from .shares import Share, even_share, next_work, parts_of
from .softmax import NONE_SEEN, SLACK, SLACK_LSE, any_over, bent_logits, no_sums, row_sums, thread_sums

UNSPECIALIZED = [
    "batch_size", "window", "sm_scale", "pool_scale", "v_scale", "logit_cap", "temperature_len", "log2_temperature_len",
    "num_splits", "row_blocks", "patience", "num_indices", "num_slots",
]  # fmt: skip
UNALIGNED = [
    "qo_indptr", "kv_indptr", "kv_indices", "prefix_lens", "custom_mask", "mask_indptr", "sinks", "window_offsets",
    "q_positions", "lse",
]  # fmt: skip


@gluon.jit
def _load_query(call, work, shape, q_tile, COLUMN: gl.constexpr):
    """The packed query rows, columns from COLUMN on, into shared memory; what is not there is 0."""
    LANES: gl.constexpr = min(q_tile.shape[1] // 8, 32)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    r = work.row_first + gl.arange(0, shape.ROWS, layout=gl.SliceLayout(1, LAYOUT))
    columns = COLUMN + gl.arange(0, q_tile.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    head = work.kv_head * shape.GROUP + r % shape.GROUP
    rows = (work.q_start + r // shape.GROUP) * call.stride_qt + head.to(gl.int64) * call.stride_qh
    pointers = gl.max_contiguous(gl.multiple_of(call.q + rows[:, None] + columns[None, :], [1, 16]), [1, 8])
    ok = (r < work.extend_len * shape.GROUP)[:, None] & (columns < shape.HEAD_DIM)[None, :]
    q = gl.load(pointers, mask=ok, other=0.0)
    if shape.NEGATE_Q:  # a negative sm_scale: its sign goes here
        q = -q
    q_tile.store(q)


@gluon.jit
def _fold_values(acc, p, slot, p_tile):
    """O^T + V^T P^T, with P of V's type."""
    weights = reinterpret(p_tile, p.dtype, p_tile.shape, p_tile.layout)
    weights.store(gl.permute(p, (1, 0)))
    fence_async_shared()
    values = reinterpret(slot, p.dtype, slot.shape, slot.layout)
    product = warpgroup_mma(values.permute((1, 0)), weights.permute((1, 0)), acc, is_async=True)
    return warpgroup_mma_wait(0, [product])


@gluon.jit
def _consume(
    WHO: gl.constexpr, WAIT: gl.constexpr, call, shape, share, ring, pe, queries, queries_pe, weights, flags,
    pairs, num_splits, patience, num_indices, num_slots,
):  # fmt: skip
    """A consumer's partition. Nothing passes between two of them: each waits for itself, and so one's softmax goes on
    beside the other's products."""
    if WAIT:
        if shape.HAS_POOL and not shape.SPLIT and WHO == 0:
            look_ahead(call, shape, pairs, num_indices, num_slots)
        gdc_wait()
    MMA: gl.constexpr = shape.MMA
    ROWS: gl.constexpr = gl.SliceLayout(0, MMA)
    STEP: gl.constexpr = 1 if shape.V_IS_K else 2
    kind: gl.constexpr = call.q.dtype.element_ty
    SLACK_HERE: gl.constexpr = SLACK_LSE if shape.LSE else SLACK
    n = 0
    cursor, sequence, base = share.cursor, share.sequence, share.base
    while cursor < share.end:
        work, start, cursor, sequence, base = next_work(
            call, shape, share, cursor, sequence, base, pairs, num_splits, WHO
        )  # fmt: skip
        _load_query(call, work, shape, queries.index(WHO), 0)
        if shape.BLOCK_PE > 0:
            _load_query(call, work, shape, queries_pe.index(WHO), shape.BLOCK_D)
        fence_async_shared()

        r = work.row_first + gl.arange(0, shape.ROWS, layout=ROWS)
        token = r // shape.GROUP
        row_position = work.offset + work.prefix_len + token
        if shape.Q_POSITIONS:
            row_position = gl.load(
                call.q_positions + work.q_start + token, mask=token < work.extend_len, other=0
            )  # fmt: skip
        whole_from, whole_to = whole_places(call, work, shape)

        acc = gl.zeros([shape.BLOCK_D, shape.ROWS], gl.float32, MMA)
        sums = no_sums(shape)
        m_i = gl.full([shape.ROWS], NONE_SEEN, gl.float32, ROWS)
        for i in range(work.first, work.last):
            scale = call.pool_scale
            if shape.APART:
                scale = gl.where(i < work.pool_tiles, scale, call.sm_scale)
            elif not shape.UNIFIED:
                scale = call.sm_scale  # the pool's is the same

            ring.wait_full(n)
            if not shape.FP8:  # rows came through the generic proxy; one that converts them fences them off itself
                fence_async_shared()
            zeros = gl.zeros([shape.BLOCK_N, shape.ROWS], gl.float32, MMA)
            at = fresh(WHO)
            s = warpgroup_mma(ring.slot(n), queries.index(at).permute((1, 0)), zeros, use_acc=False, is_async=True)
            if shape.BLOCK_PE > 0:
                k_pe = pe.index(n // STEP % pe.shape[0])
                s = warpgroup_mma(k_pe, queries_pe.index(at).permute((1, 0)), s, is_async=True)
            s = warpgroup_mma_wait(0, [s])
            if not shape.V_IS_K:
                ring.release(n)
                n += 1

            if shape.CAP or shape.TEMPERATURE:
                s = bent_logits(s, scale, call, row_position, shape)
                scale = gl.to_tensor(1.0)
            if (i * shape.BLOCK_N < whole_from) | ((i + 1) * shape.BLOCK_N > whole_to):
                s = gl.where(rows_see(call, work, shape, i, token, row_position), s * scale, float("-inf"))
                scale = gl.to_tensor(1.0)
            moves = i == work.first
            if not moves:
                moves = any_over(s * scale - m_i[None, :], SLACK_HERE, flags.index(WHO))
            if moves:
                m_new = gl.max(s * scale, 0)
                m_new = gl.where(m_new > m_i + SLACK_HERE, m_new, m_i)
                alpha = gl.exp2(m_i - m_new)
                m_i = m_new
                acc = acc * alpha[None, :]
                sums = sums * gl.convert_layout(alpha, gl.SliceLayout(0, sums.type.layout))[None, :]
            p = gl.exp2(s * scale - m_i[None, :])
            rounded = p.to(gl.float16 if shape.V_HALF else kind)
            sums += thread_sums(p if shape.LSE else rounded.to(gl.float32))
            if shape.V_SCALED and not shape.UNIFIED:  # what the pool's tiles gave, when they have ended
                if i == work.pool_tiles:
                    acc = acc * call.v_scale
            if not shape.V_IS_K:
                ring.wait_full(n)
                if not shape.FP8:
                    fence_async_shared()
            p_tile = weights.index(at)
            acc = _fold_values(acc, rounded, ring.slot(n), p_tile)
            ring.release(n)
            n += 1
        if shape.V_SCALED:
            acc = acc * gl.where(work.last <= work.pool_tiles, call.v_scale, 1.0)
        l_i = row_sums(sums, shape)
        if shape.SPLIT or shape.EVEN:
            part, parts = parts_of(shape, share, work, start, num_splits)
            if part < parts:
                pair = (work.sequence * pairs + work.pair) * shape.CONSUMERS + WHO
                finish_pair(call, work, shape, acc, m_i, l_i, queries.index(WHO), pair, part, parts, patience)
        else:
            store_result(call, work, shape, acc, m_i, l_i, queries.index(WHO))


@gluon.jit
def _produce(V: gl.constexpr, WAIT: gl.constexpr, WARPS: gl.constexpr, call, shape, share, ring, pe, codes, pairs,
             num_splits):  # fmt: skip
    """The partition of the producer of rows in 16 bits."""
    if WAIT:
        gdc_wait()
    produce(call, shape, share, ring, pe, pairs, num_splits, WARPS)


@gluon.jit
def _produce_fp8(V: gl.constexpr, WAIT: gl.constexpr, WARPS: gl.constexpr, call, shape, share, ring, pe, codes,
                 pairs, num_splits):  # fmt: skip
    """The partition of the producer of fp8 keys or values."""
    if WAIT:
        gdc_wait()
    if shape.CODE_TILES > 0:
        produce_staged(call, shape, share, ring, pe, codes, pairs, num_splits, V, WARPS)
    else:
        produce_fp8(call, shape, share, ring, pe, pairs, num_splits, V, WARPS)


@gluon.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def packed_kernel(
    q,
    k_new,
    v_new,
    o,
    k_pool,
    v_pool,
    qo_indptr,
    kv_indptr,
    kv_indices,
    prefix_lens,
    custom_mask,
    mask_indptr,
    sinks,
    window_offsets,
    q_positions,
    lse,
    partial,
    partial_ml,
    arrivals,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_ks,
    stride_kg,
    stride_vs,
    stride_vg,
    batch_size,
    window,
    sm_scale,
    pool_scale,
    v_scale,
    logit_cap,
    temperature_len,
    log2_temperature_len,
    num_splits,
    row_blocks,
    patience,
    num_indices,
    num_slots,
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_PE: gl.constexpr,
    HAS_POOL: gl.constexpr,
    UNIFIED: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    MASK: gl.constexpr,
    MASK_PREFIX: gl.constexpr,
    SINKS: gl.constexpr,
    CAP: gl.constexpr,
    TEMPERATURE: gl.constexpr,
    Q_POSITIONS: gl.constexpr,
    LSE: gl.constexpr,
    V_SCALED: gl.constexpr,
    V_IS_K: gl.constexpr,
    NEGATE_Q: gl.constexpr,
    APART: gl.constexpr,
    FP8: gl.constexpr,
    V_HALF: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    SPLIT: gl.constexpr,
    EVEN: gl.constexpr,
    PDL: gl.constexpr,
    PRODUCER_WARPS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    CODE_TILES: gl.constexpr,
):
    ROWS: gl.constexpr = BLOCK_M // CONSUMERS
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    kind: gl.constexpr = q.dtype.element_ty
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    queries = gl.allocate_shared_memory(kind, [CONSUMERS, ROWS, BLOCK_D], SWIZZLED)
    weights = gl.allocate_shared_memory(kind, [CONSUMERS, ROWS, BLOCK_N], SWIZZLED)
    slots = gl.allocate_shared_memory(kind, [STAGES, BLOCK_N, BLOCK_D], SWIZZLED)
    flags = gl.allocate_shared_memory(gl.int32, [CONSUMERS, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    queries_pe = queries
    pe = slots
    if BLOCK_PE > 0:
        PE_STAGES: gl.constexpr = STAGES if V_IS_K else (STAGES + 1) // 2
        queries_pe = gl.allocate_shared_memory(kind, [CONSUMERS, ROWS, BLOCK_PE], SWIZZLED)
        pe = gl.allocate_shared_memory(kind, [PE_STAGES, BLOCK_N, BLOCK_PE], SWIZZLED)
    codes = slots
    if CODE_TILES > 0:  # of keys, with BLOCK_PE columns of them behind BLOCK_D, then of values
        PANELS: gl.constexpr = gl.NVMMASharedLayout(64, 32, 2)
        PLACES: gl.constexpr = CODE_TILES if V_IS_K else 2 * CODE_TILES
        WORDS: gl.constexpr = (BLOCK_D if BLOCK_PE == 0 else 2 * BLOCK_D) // 4
        codes = gl.allocate_shared_memory(gl.int32, [PLACES, BLOCK_N, WORDS], PANELS)
    # every thread of a gathering producer arrives when its copies have; a converting one arrives as a whole
    full = barriers(STAGES, 1 if FP8 else PRODUCER_WARPS * 32)
    empty = barriers(STAGES, CONSUMERS)
    ring = Ring(slots, full, empty, STAGES)
    fence_async_shared()

    shape = Shape(
        NUM_HEADS, GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_PE, BLOCK_M, ROWS, CONSUMERS, BLOCK_N, HAS_POOL, UNIFIED,
        CAUSAL, WINDOW, MASK, MASK_PREFIX, SINKS, CAP, TEMPERATURE, Q_POSITIONS, window_offsets is not None, LSE,
        V_SCALED, V_IS_K, NEGATE_Q, APART, FP8, V_HALF, CODE_TILES, SPLIT, EVEN, MMA,
    )  # fmt: skip
    none = qo_indptr  # stands in for a pointer that is off
    call = Call(
        q,
        none if k_new is None else k_new,
        none if v_new is None else v_new,
        o,
        none if k_pool is None else k_pool,
        none if v_pool is None else v_pool,
        qo_indptr,
        kv_indptr,
        kv_indices,
        none if prefix_lens is None else prefix_lens,
        none if custom_mask is None else custom_mask,
        none if mask_indptr is None else mask_indptr,
        none if sinks is None else sinks,
        none if window_offsets is None else window_offsets,
        none if q_positions is None else q_positions,
        none if lse is None else lse,
        none if partial is None else partial,
        none if partial_ml is None else partial_ml,
        none if arrivals is None else arrivals,
        gl.to_tensor(stride_qt), gl.to_tensor(stride_qh), gl.to_tensor(stride_kt), gl.to_tensor(stride_kh),
        gl.to_tensor(stride_vt), gl.to_tensor(stride_vh), gl.to_tensor(stride_ot), gl.to_tensor(stride_oh),
        gl.to_tensor(stride_ks), gl.to_tensor(stride_kg), gl.to_tensor(stride_vs), gl.to_tensor(stride_vg),
        window, sm_scale, pool_scale, v_scale, logit_cap, temperature_len, log2_temperature_len,
    )  # fmt: skip
    pairs = row_blocks * (NUM_HEADS // GROUP)
    num_splits, patience = gl.to_tensor(num_splits), gl.to_tensor(patience)
    if PDL:
        gdc_launch_dependents()
    if EVEN:
        if PDL:
            prefetch_lengths(call, batch_size)
            gdc_wait()
        share = even_share(call, shape, batch_size, pairs)
    else:
        zero = gl.to_tensor(0)
        share = Share(zero, gl.to_tensor(1), zero, zero, zero, zero)
    num_indices, num_slots = gl.to_tensor(num_indices), gl.to_tensor(num_slots)
    WAIT: gl.constexpr = PDL and not EVEN  # in the partitions, which are there by then
    consumer = (
        call, shape, share, ring, pe, queries, queries_pe, weights, flags, pairs, num_splits, patience, num_indices,
        num_slots,
    )  # fmt: skip
    producer = (call, shape, share, ring, pe, codes, pairs, num_splits)
    if CONSUMERS == 2 and FP8 and not V_IS_K:
        gl.warp_specialize(
            [
                (_consume, (0, WAIT) + consumer),
                (_consume, (1, WAIT) + consumer),
                (_produce_fp8, (False, WAIT, PRODUCER_WARPS) + producer),
                (_produce_fp8, (True, WAIT, PRODUCER_WARPS) + producer),
            ],
            [4, PRODUCER_WARPS, PRODUCER_WARPS],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, WAIT) + consumer),
                (_consume, (1, WAIT) + consumer),
                (_produce_fp8 if FP8 else _produce, (False, WAIT, PRODUCER_WARPS) + producer),
            ],
            [4, PRODUCER_WARPS],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    elif FP8 and not V_IS_K:
        gl.warp_specialize(
            [
                (_consume, (0, WAIT) + consumer),
                (_produce_fp8, (False, WAIT, PRODUCER_WARPS) + producer),
                (_produce_fp8, (True, WAIT, PRODUCER_WARPS) + producer),
            ],
            [PRODUCER_WARPS, PRODUCER_WARPS],
            [PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, WAIT) + consumer),
                (_produce_fp8 if FP8 else _produce, (False, WAIT, PRODUCER_WARPS) + producer),
            ],
            [PRODUCER_WARPS],
            [PRODUCER_REGISTERS],
        )
