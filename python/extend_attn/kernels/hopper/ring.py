"""A ring of shared-memory slots between one producer and its consumers, on mbarriers.

Tile ``n`` of a stream lies in slot ``n % stages``. Its ``full`` barrier completes when the tile is there, its ``empty``
barrier when every consumer has read it; both complete once a round, so their phase is ``n // stages % 2``.
"""

# No `from __future__ import annotations`: an aggregate's fields are checked against the annotations themselves.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .gluon_compat import aggregate, constexpr_function


@gluon.jit
def barriers(number: gl.constexpr, arrivals: gl.constexpr):
    """``number`` barriers that complete after so many arrivals each."""
    made = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(made.index(i), count=arrivals)
    return made


@gluon.jit
def turn_of(n, stages: gl.constexpr):
    """(slot, round) of tile ``n``; unsigned, so that a power of two divides by bits."""
    n = gl.to_tensor(n).to(gl.uint32)
    return (n % stages).to(gl.int32), (n // stages).to(gl.int32)


@aggregate
class Ring:
    """``slots`` [stages, ...], and for each slot whether it is full and whether it is empty."""

    slots: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    stages: gl.constexpr

    @constexpr_function
    def __init__(self, slots, full, empty, stages):
        self.slots = slots
        self.full = full
        self.empty = empty
        self.stages = gl.constexpr(stages)

    @gluon.jit
    def slot(self, n):
        """Where tile ``n`` lies; signed, since descriptors of places known while compiling would all take registers."""
        return self.slots.index(n % self.stages)

    @gluon.jit
    def filled(self, n):
        """The barrier that completes when tile ``n`` is there."""
        return self.full.index(turn_of(n, self.stages)[0])

    @gluon.jit
    def hand_over(self, n, ARRIVALS: gl.constexpr):
        """Tile ``n``, which its producer's threads have stored, is there."""
        fence_async_shared()
        mbarrier.arrive(self.filled(n), count=ARRIVALS)

    @gluon.jit
    def wait_full(self, n):
        slot, turn = turn_of(n, self.stages)
        mbarrier.wait(self.full.index(slot), turn & 1)

    @gluon.jit
    def wait_empty(self, n):
        slot, turn = turn_of(n, self.stages)
        mbarrier.wait(self.empty.index(slot), (turn & 1) ^ 1)

    @gluon.jit
    def release(self, n):
        """One consumer has read tile ``n``."""
        mbarrier.arrive(self.empty.index(turn_of(n, self.stages)[0]), count=1)
