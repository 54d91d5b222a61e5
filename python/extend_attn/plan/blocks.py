"""How a head dim is cut into the power-of-two blocks that the kernels multiply with."""

from __future__ import annotations

from typing import Tuple

MIN_BLOCK = 16  # the smallest reduction that the tensor cores take in 16-bit types


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def block_head_dim(head_dim_qk: int) -> Tuple[int, int]:
    """(BLOCK_D, BLOCK_PE): one block, or the largest power of two and a smaller rest where that wastes less.

    576 is 512 + 64, 192 is 128 + 64, 96 is 64 + 32 and 80 is 64 + 16; 112 and 20 are padded to 128 and 32. BLOCK_PE 0
    means one block.
    """
    whole = max(MIN_BLOCK, next_power_of_2(head_dim_qk))
    half = whole // 2
    rest = max(MIN_BLOCK, next_power_of_2(head_dim_qk - half))
    if head_dim_qk == whole or half < MIN_BLOCK or half + rest >= whole:
        return whole, 0
    return half, rest


def block_head_dim_v(head_dim_v: int, head_dim_qk: int) -> int:
    """BLOCK_DV: the value head dim padded to a power of two, at least 16.

    Nor is it narrower than the key's first block up to 64: with 64 keys a tile and a value block of 16 or 32 beside a
    wider key, Triton 3.6 compiles warpgroup products for sm_90 that give wrong values (seen at 100/20, 64/32, 128/16;
    none with value blocks of 64 or as wide as the key's).
    """
    return max(MIN_BLOCK, next_power_of_2(head_dim_v), min(64, block_head_dim(head_dim_qk)[0]))
