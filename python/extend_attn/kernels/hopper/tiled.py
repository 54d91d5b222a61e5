"""The tiled family for Hopper (prefill, chunks): warp-specialised attention over blocks of new tokens.

A program is two or four consumer warpgroups of 64 query rows each and a producer. Programs are persistent;
tiled_schedule.py says who takes which work item. A consumer walks the key tiles of its rows from the diagonal
downwards, then the prefix downwards, and overlaps the scores of one tile with the products of the tile before: it
issues S = Q K(j), then O += P(j-1) V(j-1), and does the softmax of j while the latter runs. Only tiles at an edge (the
diagonal, a sequence's or the prefix's end, the window's start) are masked, without a window in loops of their own.
"""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from ..compat import gdc_launch_dependents, gdc_wait
from .gluon_compat import constexpr_function
from .ring import Ring, barriers
from .tiled_copies import COPY_WARPS, copy_prefixes
from .tiled_epilogue import finish_part, store
from .tiled_fp8 import CODE_TILES, produce_fp8
from .tiled_latent import BOX, PARTS, consume_latent, produce_latent
from .tiled_masks import ALL, BOTH, END, NEW, NONE, POOL, SOME, before_end, hide, seen
from .tiled_producer import Sources, produce
from .tiled_products import (
    Seat,
    State,
    end_softmax,
    release_keys,
    rescaled,
    skip_keys,
    start_products,
    start_scores,
)
from .tiled_schedule import FIELDS, MESSAGES, receive
from .tiled_softmax import EXACT, PAIRED_MAX, SLACK, logits, no_sums, rounded, row_sums, scales, temperature_of, weigh
from .tiled_work import ROWS, Call, Memory, Shape, key_place, place_of, tiles_of, value_place


@gluon.jit
def begin(seat, memory, call, item, tiles, place, temperature, c):
    """The state after the first key tile, which is masked."""
    KEYS: gl.constexpr = NEW if not c.SPLIT else BOTH if c.HAS_POOL else NEW
    t = place.begin
    keys = key_place(seat.n + t, t, tiles, c)
    s = warpgroup_mma_wait(0, [start_scores(seat, memory, keys, c)])
    release_keys(memory, keys, c)
    scale, v_scale = scales(t, tiles, call, KEYS, c)
    s = logits(s, scale, temperature, call, False, c)
    s = gl.where(seen(t, tiles, place, item, call, KEYS, c), s, float("-inf"))
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, c.S))
    w, alpha, m, l = weigh(s, m, no_sums(c), scale, 0.0, True, c)
    if c.V_SCALED and (c.UNIFIED or KEYS == BOTH):
        w = w * v_scale
    end_softmax(seat, memory, c)
    p = rounded(w, memory.v_ring.slots.dtype, c)
    return State(gl.zeros([ROWS, c.BLOCK_DV], gl.float32, c.O), m, l, p, gl.full_like(m, 1.0))


@gluon.jit
def walk(
    seat, memory, call, item, tiles, place, temperature, state, first, stop,
    KEYS: gl.constexpr, EDGES: gl.constexpr, c,
):  # fmt: skip
    """Folds key tiles ``first``..``stop`` into the state.

    KEYS: NEW, POOL or BOTH. EDGES: NONE of the tiles is masked, the prefix's END is, SOME are as ``place`` says, or
    ALL; a custom mask's bytes are then on their way while the scores are made.
    """
    for t in range(first, stop):
        keys = key_place(seat.n + t, t, tiles, c)
        values = value_place(seat.n + t - 1, t - 1, tiles, c)
        s_acc = start_scores(seat, memory, keys, c)
        state = rescaled(state, c)  # while the scores are made
        o_acc = start_products(memory, state, values, c)
        scale, v_scale = scales(t, tiles, call, KEYS, c)
        if EDGES == ALL:
            visible = seen(t, tiles, place, item, call, KEYS, c)
        s = warpgroup_mma_wait(1, [s_acc])
        release_keys(memory, keys, c)
        s = logits(s, scale, temperature, call, False, c)
        if EDGES == END:
            s = gl.where(before_end(item, c), s, float("-inf"))
        elif EDGES == ALL:
            s = gl.where(visible, s, float("-inf"))
        elif EDGES == SOME:
            s = hide(s, t, tiles, place, item, call, KEYS, c)
        slack = gl.where(t <= place.begin + EXACT, 0.0, c.SLACK)
        w, alpha, m, l = weigh(s, state.m, state.l, scale, slack, EDGES != NONE, c)
        if c.V_SCALED and (c.UNIFIED or KEYS != NEW):
            w = w * v_scale
        end_softmax(seat, memory, c)
        o, used = warpgroup_mma_wait(0, [o_acc, state.p])
        p = rounded(w, memory.v_ring.slots.dtype, c)  # into the registers of those before
        memory.v_ring.release(values)
        state = State(o, m, l, p, alpha)
    return state


@gluon.jit
def attend(WHO: gl.constexpr, memory, call, item, tiles, row0, n, number, c):
    """(accumulator, maxima, sums) of a consumer's rows over the item's key tiles."""
    CAN_SKIP: gl.constexpr = WHO < c.CONSUMERS - 1 and c.CAUSAL and c.TOKENS > c.BLOCK_N
    place = place_of(item, tiles, row0, call, c)
    temperature = temperature_of(call, item, row0, c)
    query = number % c.QUERIES * c.CONSUMERS + WHO
    seat = Seat(query, number // c.QUERIES & 1, n)
    mbarrier.wait(memory.q_full.index(query), seat.phase)
    if CAN_SKIP:  # the diagonal tiles of consumers with later tokens
        for t in range(tiles.begin, place.begin):
            skip_keys(memory, key_place(n + t, t, tiles, c), c)
    state = begin(seat, memory, call, item, tiles, place, temperature, c)
    if CAN_SKIP:
        for t in range(tiles.begin, place.begin):
            values = value_place(n + t, t, tiles, c)
            memory.v_ring.wait_full(values)
            memory.v_ring.release(values)
    if c.STAGED and c.QUERIES > 1:
        if number > 0:  # the output before has left the query's place
            tma.store_wait(0)
            mbarrier.arrive(memory.q_empty.index((number - 1) % c.QUERIES * c.CONSUMERS + WHO), count=1)
    first = place.begin + 1
    NEW_EDGES: gl.constexpr = ALL if c.MASK else NONE
    if c.WINDOW or c.MASK_PREFIX:
        state = walk(
            seat, memory, call, item, tiles, place, temperature, state, first, tiles.end,
            BOTH if c.HAS_POOL else NEW, ALL if c.MASK else SOME, c,
        )  # fmt: skip
    elif not c.HAS_POOL:
        state = walk(
            seat, memory, call, item, tiles, place, temperature, state, first, tiles.end, NEW, NEW_EDGES, c
        )  # fmt: skip
    else:
        stop_new = gl.minimum(tiles.new_tiles, tiles.end)
        stop_cut = gl.minimum(place.start_pool, tiles.end)
        state = walk(seat, memory, call, item, tiles, place, temperature, state, first, stop_new, NEW, NEW_EDGES, c)
        first_cut = gl.maximum(tiles.new_tiles, first)
        state = walk(seat, memory, call, item, tiles, place, temperature, state, first_cut, stop_cut, POOL, END, c)
        first_pool = gl.maximum(place.start_pool, first)
        state = walk(
            seat, memory, call, item, tiles, place, temperature, state, first_pool, tiles.end, POOL, NONE, c
        )  # fmt: skip
    if not c.STAGED:  # else the output leaves through the query's place
        mbarrier.arrive(memory.q_empty.index(query), count=1)
    state = rescaled(state, c)
    values = value_place(n + tiles.end - 1, tiles.end - 1, tiles, c)
    o_acc = start_products(memory, state, values, c)
    o, used = warpgroup_mma_wait(0, [o_acc, state.p])
    memory.v_ring.release(values)
    return o, state.m, row_sums(state.l, c)


@gluon.jit
def consume(WHO: gl.constexpr, call, memory, c):
    """A consumer's partition: items as they come."""
    if c.PDL:
        gdc_wait()
    n = 0  # key tiles so far
    number = 0  # items so far
    item = receive(memory.board, number, c)
    while item.extend_len != 0:
        tiles = tiles_of(item, call, c)
        row0 = item.first
        head = item.head_block * c.HEADS
        if c.HEADS == 2:
            head += WHO
        else:
            row0 += WHO * ROWS
        o, m, l = attend(WHO, memory, call, item, tiles, row0, n - tiles.begin, number, c)
        if c.SPLIT:
            finish_part(call, item, row0, head, o, m, l, c)
        else:
            query = number % c.QUERIES * c.CONSUMERS + WHO
            store(query, memory, call, item, row0, head, o, m, l, c)
            if c.STAGED and c.QUERIES == 1:
                tma.store_wait(0)
                mbarrier.arrive(memory.q_empty.index(query), count=1)
        n += tiles.end - tiles.begin
        number += 1
        item = receive(memory.board, number, c)
    if c.STAGED:
        tma.store_wait(0)


@constexpr_function
def partitions(consumers, of_a_consumer, of_the_producer):
    """What warp specialisation asks for of all partitions but the first."""
    return [of_a_consumer] * (consumers - 1) + [of_the_producer]


UNSPECIALIZED = [
    "patience", "batch_size", "row_blocks", "splits", "sections", "window", "new_scale", "pool_scale", "v_scale",
    "logit_cap", "temperature_len", "log2_temperature_len", "stride_ks", "stride_kg", "stride_vs", "stride_vg",
    "stride_vt", "stride_vh", "stride_ot", "stride_oh",
]  # fmt: skip
UNALIGNED = [
    "qo_indptr", "kv_indptr", "kv_indices", "prefix_lens", "custom_mask", "mask_indptr", "sinks", "window_offsets",
    "q_positions", "lse",
]  # fmt: skip


@gluon.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def tiled_kernel(
    q_desc, k_desc, v_desc, o_desc, k_runs, k_prefix, v_prefix, k_rows, v_rows, ready, v_new, k_pool, v_pool, o, lse,
    qo_indptr, kv_indptr, kv_indices, prefix_lens, custom_mask, mask_indptr, sinks, window_offsets, q_positions,
    partial, partial_ml, arrivals, stride_ks, stride_kg, stride_vs, stride_vg, stride_vt, stride_vh, stride_ot,
    stride_oh, patience, batch_size, row_blocks, splits, sections, window, new_scale, pool_scale, v_scale, logit_cap,
    temperature_len, log2_temperature_len,
    CONSUMERS: gl.constexpr, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, BLOCK_N: gl.constexpr, K_COLUMNS: gl.constexpr,
    K_CHUNKS: gl.constexpr, BLOCK_DV: gl.constexpr, V_SLICES: gl.constexpr, QUERIES: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, ONE_RING: gl.constexpr, STAGED: gl.constexpr,
    LATENT: gl.constexpr, APART: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr, HAS_POOL: gl.constexpr,
    UNIFIED: gl.constexpr, FP8: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, MASK: gl.constexpr,
    MASK_PREFIX: gl.constexpr, SINKS: gl.constexpr, CAP: gl.constexpr, TEMPERATURE: gl.constexpr,
    Q_POSITIONS: gl.constexpr, LSE: gl.constexpr, V_SCALED: gl.constexpr, NEGATE: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, PRODUCER_WARPS: gl.constexpr,
    CODE_COLUMNS: gl.constexpr,
):  # fmt: skip
    """Descriptors are ragged (launch_tiled.py); tensors as in ``Inputs``; numbers in the order of recipe.scalars."""
    if PDL:
        gdc_launch_dependents()
    RUNS: gl.constexpr = k_runs is not None
    GATHERED: gl.constexpr = k_prefix is not None
    BESIDE: gl.constexpr = ready is not None
    FROM_POOL: gl.constexpr = HAS_POOL and not GATHERED
    COPIES: gl.constexpr = MASK and not UNIFIED  # new values come one by one too
    # a gathered slot is filled by all threads of the producer
    ARRIVALS: gl.constexpr = 32 * PRODUCER_WARPS if FROM_POOL or COPIES else 1
    OFFSETS: gl.constexpr = window_offsets is not None
    BY_POSITION: gl.constexpr = WINDOW and Q_POSITIONS
    SHARE: gl.constexpr = PARTS if LATENT else 1  # consumers that share a tile's scores
    KEYS: gl.constexpr = BLOCK_N // SHARE
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    c = Shape(
        CONSUMERS, NUM_HEADS, GROUP, HEADS, NUM_HEADS // HEADS, ROWS if HEADS == 2 or LATENT else CONSUMERS * ROWS,
        HEAD_DIM, HEAD_DIM_V, BLOCK_N, K_COLUMNS, K_CHUNKS, BLOCK_DV, V_SLICES, QUERIES, ONE_RING, STAGED, LATENT,
        APART, SPLIT, PDL, HAS_POOL, GATHERED, BESIDE, (FROM_POOL and not FP8) or COPIES, UNIFIED, FP8, RUNS, CAUSAL,
        WINDOW, MASK, MASK_PREFIX, SINKS, CAP, TEMPERATURE, Q_POSITIONS, BY_POSITION, MASK, OFFSETS, LSE,
        V_SCALED, NEGATE, 0.0 if V_SCALED and q_desc.dtype == gl.float16 else SLACK, BLOCK_DV <= PAIRED_MAX,
        gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16]), O, gl.DotOperandLayout(0, O, 2),
    )  # fmt: skip
    call = Call(
        o_desc if STAGED else q_desc, o, lse if LSE else o, partial if SPLIT else o, partial_ml if SPLIT else o,
        arrivals if SPLIT else qo_indptr, gl.to_tensor(patience),
        qo_indptr, kv_indptr, prefix_lens if UNIFIED else o, custom_mask if MASK else o, mask_indptr if MASK else o,
        sinks if SINKS else o, window_offsets if OFFSETS else o, q_positions if Q_POSITIONS else o,
        gl.to_tensor(stride_ot), gl.to_tensor(stride_oh), gl.to_tensor(batch_size), gl.to_tensor(row_blocks),
        gl.to_tensor(splits), gl.to_tensor(sections), gl.to_tensor(window), gl.to_tensor(new_scale),
        gl.to_tensor(pool_scale), gl.to_tensor(v_scale), gl.to_tensor(logit_cap), gl.to_tensor(temperature_len),
        gl.to_tensor(log2_temperature_len),
    )  # fmt: skip
    sources = Sources(
        q_desc, k_desc, v_desc, k_pool if HAS_POOL else o, v_pool if HAS_POOL else o,
        o if v_new is None else v_new, kv_indices, gl.to_tensor(stride_ks), gl.to_tensor(stride_kg),
        gl.to_tensor(stride_vs), gl.to_tensor(stride_vg), gl.to_tensor(stride_vt), gl.to_tensor(stride_vh),
        k_runs if RUNS else q_desc,
        k_prefix if GATHERED else q_desc,
        v_prefix if GATHERED else q_desc,
        k_rows if BESIDE else o,
        v_rows if BESIDE else o,
        ready if BESIDE else qo_indptr,
    )  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, K_COLUMNS], dtype)
    K_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, K_COLUMNS], dtype)
    V_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_DV], dtype)
    WORDS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    Q_SLOTS: gl.constexpr = K_CHUNKS * (1 if LATENT else CONSUMERS * QUERIES)
    q_slots = gl.allocate_shared_memory(dtype, [Q_SLOTS, ROWS, K_COLUMNS], Q_LAYOUT)
    q_rest = q_slots
    V_COLUMNS: gl.constexpr = BOX if LATENT else BLOCK_DV
    weights = q_slots
    maxima = q_slots
    sums = q_slots
    told = q_slots
    if LATENT:
        q_rest = gl.allocate_shared_memory(dtype, [1, ROWS, BOX], Q_LAYOUT)
        W_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, KEYS], dtype)
        weights = gl.allocate_shared_memory(dtype, [PARTS, ROWS, KEYS], W_LAYOUT)
        maxima = gl.allocate_shared_memory(gl.float32, [PARTS, ROWS], WORDS)
        sums = gl.allocate_shared_memory(gl.float32, [PARTS, ROWS], WORDS)
        told = barriers(6, 1)
    k_ring = Ring(
        gl.allocate_shared_memory(dtype, [K_STAGES * SHARE, KEYS, K_COLUMNS], K_LAYOUT),
        barriers(K_STAGES * SHARE, ARRIVALS), barriers(K_STAGES * SHARE, CONSUMERS), K_STAGES * SHARE,
    )  # fmt: skip
    pool_slots = q_slots
    if BESIDE or (FROM_POOL and not (LATENT or FP8)):
        pool_slots = gl.allocate_shared_memory(gl.int32, [2, BLOCK_N], WORDS)
    v_ring = k_ring
    if not ONE_RING:
        v_ring = Ring(
            gl.allocate_shared_memory(dtype, [V_STAGES * SHARE, KEYS, V_COLUMNS], V_LAYOUT),
            barriers(V_STAGES * SHARE, ARRIVALS), barriers(V_STAGES * SHARE, 1 if LATENT else CONSUMERS),
            V_STAGES * SHARE,
        )  # fmt: skip
    memory = Memory(
        q_slots,
        q_rest,
        barriers(CONSUMERS * QUERIES, 1),
        barriers(CONSUMERS * QUERIES, 1),
        k_ring,
        v_ring,
        pool_slots,
        weights, maxima, sums, told,
        Ring(
            gl.allocate_shared_memory(gl.int32, [MESSAGES * FIELDS, 1], WORDS),
            barriers(MESSAGES, 1), barriers(MESSAGES, CONSUMERS), MESSAGES,
        ),
    )  # fmt: skip
    fence_async_shared()
    if FROM_POOL and FP8:
        CODES: gl.constexpr = gl.NVMMASharedLayout(64, 32, 2)
        staged = gl.allocate_shared_memory(gl.int32, [CODE_TILES, BLOCK_N, CODE_COLUMNS // 4], CODES)
        gl.warp_specialize(
            [
                (consume, (0, call, memory, c)),
                (consume, (1, call, memory, c)),
                (produce_fp8, (sources, call, memory, staged, ARRIVALS, c)),
            ],
            [4, PRODUCER_WARPS],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    elif BESIDE:
        gl.warp_specialize(
            [
                (consume, (0, call, memory, c)),
                (consume, (1, call, memory, c)),
                (copy_prefixes, (sources, call, memory, c)),
                (produce, (sources, call, memory, ARRIVALS, c)),
            ],
            [4, COPY_WARPS, PRODUCER_WARPS],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume_latent if LATENT else consume, (0, call, memory, c)),
                (consume_latent if LATENT else consume, (1, call, memory, c)),
                (produce_latent if LATENT else produce, (sources, call, memory, ARRIVALS, c)),
            ]
            if CONSUMERS == 2
            else [
                (consume, (0, call, memory, c)),
                (consume, (1, call, memory, c)),
                (consume, (2, call, memory, c)),
                (consume, (3, call, memory, c)),
                (produce, (sources, call, memory, ARRIVALS, c)),
            ],
            partitions(CONSUMERS, 4, PRODUCER_WARPS),
            partitions(CONSUMERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS),
        )
