"""What differs between the Gluons of Triton 3.6 to 3.9, here and only here."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.core import _aggregate as aggregate

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
gather_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "thread_barrier", None) or gl.barrier
constexpr_function = gluon.constexpr_function


def struct(cls):
    """An aggregate that is made from its fields in their order: 3.9 makes that constructor itself."""
    names = tuple(cls.__annotations__)
    constants = tuple(kind is gl.constexpr for kind in cls.__annotations__.values())

    def __init__(self, *values):
        for i in range(len(names)):
            setattr(self, names[i], gl.constexpr(values[i]) if constants[i] else values[i])

    cls.__init__ = constexpr_function(__init__)
    return aggregate(cls)


# (memory, type, shape, layout): the same shared memory seen as something else
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret

# a barrier of one partition's threads
sync = getattr(gl, "barrier", None) or gl.thread_barrier
