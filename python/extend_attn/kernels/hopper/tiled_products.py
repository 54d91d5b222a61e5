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

from .gluon_compat import struct
from .tiled_softmax import rescale
from .tiled_work import PANEL, ROWS


@struct
class State:
    """A consumer's running softmax: accumulators (``rest`` is a stand-in where the first has all columns), maxima and
    sums, the weights whose values are still to come, and what the accumulators are still to be multiplied by."""

    o: gl.tensor
    rest: gl.tensor
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
        q = memory.q_slots.index(seat.query * c.K_CHUNKS + chunk)
        k = memory.k_ring.slot(at)
        if c.K_REST > 0:  # a slot's columns past the head dim are not multiplied
            left = k.slice(0, PANEL, 1).permute((1, 0))
            acc = warpgroup_mma(q.slice(0, PANEL, 1), left, acc, use_acc=False, is_async=True)
            right = k.slice(PANEL, c.K_REST, 1).permute((1, 0))
            acc = warpgroup_mma(q.slice(PANEL, c.K_REST, 1), right, acc, is_async=True)
        else:
            acc = warpgroup_mma(q, k.permute((1, 0)), acc, use_acc=chunk > 0, is_async=True)
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
    v = memory.v_ring.slot(n)
    rest = state.rest
    if c.V_REST > 0:
        o = warpgroup_mma(state.p, v.slice(0, PANEL, 1), state.o, is_async=True)
        p = gl.convert_layout(state.p, gl.DotOperandLayout(0, c.REST, 2))
        rest = warpgroup_mma(p, v.slice(PANEL, c.V_REST, 1), rest, is_async=True)
    else:
        o = warpgroup_mma(state.p, v, state.o, is_async=True)
    return o, rest


@gluon.jit
def finish_products(state, o, rest, c):
    """The accumulators of ``start_products``, once they are made."""
    if c.V_REST > 0:
        o, rest, used = warpgroup_mma_wait(0, [o, rest, state.p])
    else:
        o, used = warpgroup_mma_wait(0, [o, state.p])
    return o, rest


@gluon.jit
def rescaled(state, c):
    o = rescale(state.o, state.alpha, c.O)
    rest = state.rest
    if c.V_REST > 0:
        rest = rescale(rest, state.alpha, c.REST)
    return State(o, rest, state.m, state.l, state.p, state.alpha)


@gluon.jit
def no_products(c):
    """Accumulators of nothing."""
    o = gl.zeros([ROWS, PANEL if c.V_REST > 0 else c.BLOCK_DV], gl.float32, c.O)
    if c.V_REST > 0:
        rest = gl.zeros([ROWS, c.V_REST], gl.float32, c.REST)
    else:
        rest = gl.to_tensor(0.0)
    return o, rest
