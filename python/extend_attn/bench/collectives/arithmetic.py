"""Sizes, bandwidths and published lines of the all-reduce bench. Imports no torch."""

from __future__ import annotations

from typing import Dict, List, Optional

from ...comm.sizes import parse_bytes

KIB, MIB = 1 << 10, 1 << 20
SMALLEST, LARGEST = 4 * KIB, 64 * MIB
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

# us of one all-reduce of bf16 on two H100, graph replay: SGLang's custom all-reduce in the data set of NVIDIA's
# AIConfigurator. The lines to be at or under.
PUBLISHED_US: Dict[int, float] = {
    8 * KIB: 2.6, 64 * KIB: 3.0, 256 * KIB: 3.7, 1 * MIB: 5.9, 2 * MIB: 9.2, 4 * MIB: 16.7, 8 * MIB: 29.4,
}  # fmt: skip


def sizes_named(text: Optional[str]) -> List[int]:
    """Bytes for ``--sizes``: single sizes, or ``LOW..HIGH`` for the powers of two between, by commas. None: all."""
    sizes: List[int] = []
    for part in (text or f"{SMALLEST}..{LARGEST}").split(","):
        low, dots, high = part.partition("..")
        size, last = parse_bytes(low), parse_bytes(high) if dots else parse_bytes(low)
        if size < 1 or last < size:
            raise ValueError(f"sizes: {part!r} holds no size")
        while size <= last:
            sizes.append(size)
            size *= 2
    return sorted(set(sizes))


def bus_bandwidth(nbytes: int, world: int, us: float) -> float:
    """GB/s by nccl-tests' definition: what each rank must send at least, 2 (n - 1) / n times the data, over the time.

    It can be held against the rate of one direction of a link, whatever the number of ranks.
    """
    return nbytes * 2 * (world - 1) / world / us / 1e3
