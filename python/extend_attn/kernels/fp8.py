"""fp8 pool values to the query's type, in registers: exact, NaN codes stay NaN."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dequantise(x, dtype: tl.constexpr):
    """``x`` as ``dtype``. Bytes (uint8) are e4m3 codes, for architectures before sm_89, which can't convert them.

    An e4m3 code's exponent and mantissa are an fp16's, 8 binades too low: shift into place, multiply by 2^8.
    """
    if x.dtype == tl.uint8:
        code = x.to(tl.uint16)
        bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        value = bits.to(tl.float16, bitcast=True) * 256.0
        return tl.where((code & 0x7F) == 0x7F, float("nan"), value).to(dtype)
    else:
        return x.to(dtype)
