"""Copies the prefixes' keys and values out of the pool, once a call, into rows that follow one another.

A kernel that reads a prefix many times, a block of new tokens each, looks every slot up and converts every fp8 code as
often. After this one it finds contiguous rows of the query's type, which TMA loads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .compat import gdc_launch_dependents, gdc_wait
from .fp8 import dequantise

UNSPECIALIZED = ["stride_ks", "stride_kg", "stride_vs", "stride_vg", "batch_size"]
UNALIGNED = ["kv_indptr", "kv_indices"]


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def gather_prefix_kernel(
    k_pool,
    v_pool,
    kv_indptr,
    kv_indices,
    k_prefix,
    v_prefix,
    stride_ks,
    stride_kg,
    stride_vs,
    stride_vg,
    batch_size,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """``k_prefix`` [indices, NUM_KV_HEADS, HEAD_DIM], ``v_prefix`` with HEAD_DIM_V: row i is that of slot
    ``kv_indices[i]``, without its scale. Programs take blocks of ROWS indices of one head in turns."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()  # for the pool's rows, and for the reader of the rows before
    first = tl.load(kv_indptr).to(tl.int64)
    last = tl.load(kv_indptr + batch_size).to(tl.int64)
    blocks = tl.cdiv(last - first, ROWS).to(tl.int32)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    for i in range(tl.program_id(0), blocks * NUM_KV_HEADS, tl.num_programs(0)):
        head = tl.zeros([], tl.int64) + i % NUM_KV_HEADS
        row = first + i // NUM_KV_HEADS * ROWS + tl.arange(0, ROWS)
        exists = row < last
        slot = tl.load(kv_indices + row, mask=exists, other=0).to(tl.int64)
        in_k = exists[:, None] & (d < HEAD_DIM)[None, :]
        in_v = exists[:, None] & (dv < HEAD_DIM_V)[None, :]
        keys = tl.load(k_pool + (slot * stride_ks + head * stride_kg)[:, None] + d[None, :], mask=in_k)
        values = tl.load(v_pool + (slot * stride_vs + head * stride_vg)[:, None] + dv[None, :], mask=in_v)
        to = row * NUM_KV_HEADS + head
        tl.store(
            k_prefix + (to * HEAD_DIM)[:, None] + d[None, :], dequantise(keys, k_prefix.dtype.element_ty), mask=in_k
        )
        tl.store(
            v_prefix + (to * HEAD_DIM_V)[:, None] + dv[None, :],
            dequantise(values, v_prefix.dtype.element_ty),
            mask=in_v,
        )
