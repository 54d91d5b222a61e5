"""Is a bound launch's key as fine as Triton's own specialisation? Run by test_bound.py in a process of its own.

Compiles one small kernel, for a GPU that need not be there, for every pair of arguments that differ in one fact, and
fails where two calls of one key would have got different kernels.
"""

from __future__ import annotations

import itertools
import sys

import torch
import triton
import triton.language as tl
from compile_only import architecture

from extend_attn.kernels.bound import _key
from extend_attn.kernels.recipe import kernel


@triton.jit(do_not_specialize=["count", "scale"], do_not_specialize_on_alignment=["kv_indices"])
def small(q, kv_indices, partial, stride_qt, stride_qh, count, scale, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = tl.load(kv_indices + i, mask=i < count, other=0)
    x = tl.load(q + at * stride_qt + i * stride_qh).to(tl.float32) * scale
    if FLAG:
        x += count
    if partial is not None:
        x += tl.load(partial + i)
    tl.store(q + i, x.to(q.dtype.element_ty))


def moved(dtype: torch.dtype, elements: int) -> torch.Tensor:
    return torch.empty(64, dtype=dtype)[elements:]


Q = [moved(torch.float16, 0), moved(torch.float16, 8), moved(torch.float16, 1), moved(torch.bfloat16, 0)]
INDICES = [moved(torch.int32, 0), moved(torch.int32, 1), moved(torch.int64, 0)]
PARTIAL = [None, moved(torch.float32, 0)]
STRIDES = [1, 2, 16, 17, 32, 2**31]
COUNTS = [1, 5, 16, 2**31]
SCALES = [1.0, 0.3]
FLAGS = [(True, 16), (False, 16), (1, 16), (True, 32)]
CHOICES = [Q, INDICES, PARTIAL, STRIDES, STRIDES, COUNTS, SCALES, FLAGS]


def main() -> int:
    base = [options[0] for options in CHOICES]
    calls = [tuple(base)]
    for (i, a), (j, b) in itertools.combinations(enumerate(CHOICES), 2):
        for x, y in itertools.product(a, b):
            call = list(base)
            call[i], call[j] = x, y
            calls.append(tuple(call))
    found, shared = {}, 0
    with architecture(90):
        for *arguments, (flag, block) in calls:
            one = kernel(small, 1, tuple(arguments[3:]), {"FLAG": flag, "BLOCK": block}, num_warps=1)
            compiled = small.warmup(*arguments, flag, block, grid=(1,), num_warps=1)
            before = found.setdefault(_key(one, arguments, 0), compiled)
            if before is not compiled:
                print(f"one key, two kernels: {arguments}, {flag}, {block}")
                return 1
            shared += 1
    kernels = len(set(map(id, found.values())))
    print(f"Triton {triton.__version__}: {len(calls)} calls, {len(found)} keys, {kernels} kernels")
    return int(len(found) >= shared)


if __name__ == "__main__":
    sys.exit(main())
