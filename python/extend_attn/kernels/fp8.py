"""fp8 pool values to the query's type, in registers: exact, NaN codes stay NaN."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dequantise(x, dtype: tl.constexpr):
    """``x`` as ``dtype``. Codes come as uint8 for e4m3 and as int8 for e5m2 where Triton's own conversion won't do.

    An e5m2 code is the upper byte of an fp16. An e4m3 code's exponent and mantissa are an fp16's, 8 binades too low:
    shift into place, multiply by 2^8; its one NaN code is apart. Both are exact, and so is the step to a wider type.
    """
    if x.dtype == tl.int8:
        bits = x.to(tl.uint8, bitcast=True).to(tl.uint16) << 8
        return bits.to(tl.float16, bitcast=True).to(dtype)
    elif x.dtype == tl.uint8:
        code = x.to(tl.uint16)
        bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        value = bits.to(tl.float16, bitcast=True) * 256.0
        return tl.where((code & 0x7F) == 0x7F, float("nan"), value).to(dtype)
    else:
        return x.to(dtype)
