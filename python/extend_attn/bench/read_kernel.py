"""A Triton kernel that reads a buffer once and keeps nothing but a checksum: the bench's read bandwidth ceiling."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096
BLOCKS_PER_PROGRAM = 16


@triton.jit
def _read(buffer, checksums, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    start = buffer + program.to(tl.int64) * (BLOCK * BLOCKS)
    total = tl.zeros((BLOCK,), tl.int32)
    for block in range(BLOCKS):
        total += tl.load(start + block * BLOCK + lanes)
    tl.store(checksums + program, tl.sum(total))


def read_all(buffer: torch.Tensor) -> torch.Tensor:
    """Per-program sums of an int32 buffer whose length is a multiple of BLOCK * BLOCKS_PER_PROGRAM elements."""
    programs = buffer.numel() // (BLOCK * BLOCKS_PER_PROGRAM)
    checksums = torch.empty(programs, device=buffer.device, dtype=torch.int32)
    _read[(programs,)](buffer, checksums, BLOCK=BLOCK, BLOCKS=BLOCKS_PER_PROGRAM, num_warps=8)
    return checksums
