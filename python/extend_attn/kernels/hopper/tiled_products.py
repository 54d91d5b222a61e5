"""A consumer's warpgroup products, issued and waited for, and the state that they need between tiles."""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .addresses import fresh
from .gluon_compat import struct
from .tiled_softmax import operand, rescale
from .tiled_work import ROWS


@struct
class State:
    """A consumer's running softmax: accumulator, maxima and lanes' sums, the weights whose values are still to come
    (``rounded``), and what the accumulator is still to be multiplied by."""

    o: gl.tensor
    m: gl.tensor
    l: gl.tensor
    p: gl.tensor
    alpha: gl.tensor


@struct
class Seat:
    """Where a consumer finds what its item needs: its query tile, the phase in which that tile's barrier is, the number
    of the item's key tile 0 among all."""

    query: gl.tensor
    phase: gl.tensor
    n: gl.tensor


@gluon.jit
def start_scores(seat, memory, n, c):
    """Issues S = Q K^T of the key tile in ring position ``n``. Where the ring holds no second tile, each slot is
    released as soon as it is read, except the last."""
    ONE_TILE: gl.constexpr = memory.k_ring.stages == c.K_CHUNKS
    acc = gl.zeros([ROWS, c.BLOCK_N], gl.float32, c.S)
    for chunk in gl.static_range(c.K_CHUNKS):
        at = n * c.K_CHUNKS + chunk
        memory.k_ring.wait_full(at)
        if c.GATHERS:
            fence_async_shared()
        query = seat.query * c.K_CHUNKS + chunk
        q = memory.q_slots.index(fresh(query) if c.K_CHUNKS > 1 else query)
        keys = memory.k_ring.slot(at)
        if c.K_COLUMNS == 128 and c.HEAD_DIM <= 96:  # the padding is not multiplied
            front, back = keys.slice(0, 64, 1).permute((1, 0)), keys.slice(64, 32, 1).permute((1, 0))
            acc = warpgroup_mma(q.slice(0, 64, 1), front, acc, use_acc=False, is_async=True)
            acc = warpgroup_mma(q.slice(64, 32, 1), back, acc, is_async=True)
        else:
            acc = warpgroup_mma(q, keys.permute((1, 0)), acc, use_acc=chunk > 0, is_async=True)
        if ONE_TILE and chunk > 0:
            acc = warpgroup_mma_wait(1, [acc])
            memory.k_ring.release(at - 1)
    return acc


@gluon.jit
def release_keys(memory, n, c):
    """The slots that ``start_scores`` has left."""
    ONE_TILE: gl.constexpr = memory.k_ring.stages == c.K_CHUNKS
    for chunk in gl.static_range(c.K_CHUNKS - 1 if ONE_TILE else 0, c.K_CHUNKS):
        memory.k_ring.release(n * c.K_CHUNKS + chunk)


@gluon.jit
def skip_keys(memory, n, c):
    for chunk in gl.static_range(c.K_CHUNKS):
        memory.k_ring.wait_full(n * c.K_CHUNKS + chunk)
        memory.k_ring.release(n * c.K_CHUNKS + chunk)


@gluon.jit
def end_softmax(seat, memory, c):
    """Keeps the exponentials of a wide tile before the wait for the products before, which they overlap: the compiler
    moves none past a barrier's branch, and moves all behind those products otherwise. This wait has long been over.
    With 64 keys a tile the consumers' softmaxes and products overlap one another's as well without it."""
    if c.BLOCK_N > 64:
        mbarrier.wait(memory.q_full.index(seat.query), seat.phase)


@gluon.jit
def start_products(memory, state, n, c):
    """Issues O += P V of the value tile in ring position ``n``."""
    memory.v_ring.wait_full(n)
    if c.GATHERS:
        fence_async_shared()
    p = operand(state.p, memory.v_ring.slots.dtype, c)
    v = memory.v_ring.slots.index(fresh(0)) if memory.v_ring.stages == 1 else memory.v_ring.slot(n)
    return warpgroup_mma(p, v, state.o, is_async=True)


@gluon.jit
def rescaled(state, c):
    return State(rescale(state.o, state.alpha, c.O), state.m, state.l, state.p, state.alpha)
