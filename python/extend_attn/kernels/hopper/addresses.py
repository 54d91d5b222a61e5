"""Addresses as the compiler should make them, and does not by itself."""

# Gluon reads annotations of compile-time parameters: no `from __future__ import annotations`.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def fresh(place):
    """``place``, anew at each use. Of what stays the same for a whole loop the compiler keeps all addresses that follow
    from it, ahead of the loop: at head dim 512 and for wide queries that is more than registers hold, and what is
    spilled comes back from the L2."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [gl.to_tensor(place)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def rows_at(base, slots, stride):
    """Pointers to the rows of ``slots``, which are multiplied by the bytes of an element already, ``stride`` elements
    apart. Two factors of 32 bits are multiplied as such, by one instruction: left to itself the compiler multiplies 64
    bits by 64."""
    SIZE: gl.constexpr = base.dtype.element_ty.primitive_bitwidth // 8
    if stride.dtype == gl.int32:
        rows = gl.inline_asm_elementwise(
            "mad.wide.u32 $0, $1, $2, $3;", "=l,r,r,l", [slots, stride, base.to(gl.uint64, bitcast=True)],
            dtype=gl.uint64, is_pure=True, pack=1,
        )  # fmt: skip
        return rows.to(base.dtype, bitcast=True)
    else:
        return base + (slots.to(gl.uint32) // SIZE).to(gl.int64) * stride
