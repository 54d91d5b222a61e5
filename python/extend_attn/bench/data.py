"""Tensors of a row: several input sets over one layout, with everything that nobody may read poisoned with NaN.

The pool also holds the new tokens, in slots that the two-stage index array does not name: peers that read everything
through a page table find prefix and new tokens there, and every provider works on the same bytes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import List, Optional, Tuple

import torch

from .. import reference
from .problems import Row
from .timing import rotations

SPARE_SLOTS = 512  # slots that no sequence owns
CPU_L2 = 1 << 20  # a CPU's timings are for the tests of the bench; two sets will do


@dataclass
class InputSet:
    """One set of tensors of a call. q, o ``[T, Hq, D]``; k, v ``[T, Hkv, D]``; pools ``[S, Hkv, D]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    k_pool: torch.Tensor
    v_pool: torch.Tensor
    prefix_slots: torch.Tensor  # [B * prefix] int64: the pool slots of every sequence's prefix
    all_slots: torch.Tensor  # [B, prefix + new] int64: slots of prefix and new tokens (none unless all are as long)


@dataclass
class Batch:
    """A row's input sets and the layout they share."""

    row: Row
    device: torch.device
    qo_indptr: torch.Tensor  # [B + 1] int32
    kv_indptr: torch.Tensor  # [B + 1] int32, prefix only
    sets: List[InputSet]
    custom_mask: Optional[torch.Tensor] = None  # flat uint8, rows of prefix + new; the prefix's columns do not count
    mask_indptr: Optional[torch.Tensor] = None  # [B + 1] int64
    _expected: Optional[torch.Tensor] = field(default=None, repr=False)

    @property
    def window(self) -> int:
        """``sliding_window_size`` as the library takes it."""
        return self.row.window or -1

    def arguments(self, index: int, out: Optional[torch.Tensor] = None) -> tuple:
        """The positional arguments of ``extend_attention_fwd``, and SGLang's function of that name, for one set."""
        one = self.sets[index]
        return (
            one.q, one.k, one.v, one.o if out is None else out, one.k_pool, one.v_pool, self.qo_indptr, self.kv_indptr,
            one.prefix_slots, self.custom_mask, True, self.mask_indptr, self.row.new_tokens, 1.0, 1.0,
        )  # fmt: skip

    def expected(self) -> torch.Tensor:
        """The reference's fp32 answer to set 0, computed once."""
        if self._expected is None:
            first = self.sets[0]
            out = torch.full_like(first.o, math.nan, dtype=torch.float32)
            reference.extend_attention_fwd(*self.arguments(0, out), sliding_window_size=self.window)
            self._expected = out
        return self._expected

    def poison(self) -> None:
        """NaN in every output, so that an element that is not written cannot pass for a right one."""
        for one in self.sets:
            one.o.fill_(math.nan)

    def gathered(self, index: int) -> List[torch.Tensor]:
        """Contiguous ``[B, prefix + new, Hkv, D]`` keys and values of one set, for peers without a page table."""
        one = self.sets[index]
        return [one.k_pool[one.all_slots], one.v_pool[one.all_slots]]

    def pages(self, index: int, size: int) -> List[torch.Tensor]:
        """Keys and values of one set in pages ``[pages, size, Hkv, D]`` in random order, and their table ``[B, n]``."""
        row = self.row
        length = row.prefix + row.new_tokens
        each = -(-length // size)
        order = torch.randperm(row.batch * each, device=self.device)
        stored: List[torch.Tensor] = []
        for rows in self.gathered(index):
            padded = rows.new_zeros(row.batch, each * size, row.num_kv_heads, row.head_dim)
            padded[:, :length] = rows
            cache = torch.empty_like(padded).view(row.batch * each, size, row.num_kv_heads, row.head_dim)
            cache[order] = padded.view_as(cache)
            stored.append(cache)
        return [*stored, order.view(row.batch, each).to(torch.int32)]


def make_batch(row: Row, device: torch.device, *, num_sets: Optional[int] = None, seed: int = 0) -> Batch:
    """Random tensors for a row; enough sets that a rotation over them leaves nothing warm in the L2."""
    if num_sets is None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_L2
        num_sets = rotations(row.bytes, l2)
    generator = torch.Generator(device=device).manual_seed(seed)
    custom_mask, mask_indptr = _trees(row, device) if row.tree else (None, None)
    return Batch(
        row=row,
        device=device,
        qo_indptr=_starts(row.new_lengths, device),
        kv_indptr=_starts(row.prefixes, device),
        sets=[_make_set(row, device, generator) for _ in range(num_sets)],
        custom_mask=custom_mask,
        mask_indptr=mask_indptr,
    )


def _starts(lengths: List[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def _trees(row: Row, device: torch.device) -> Tuple[torch.Tensor, torch.Tensor]:
    """(mask, mask_indptr): the same binary tree of new tokens in every sequence."""
    ancestors = torch.eye(row.new_tokens, dtype=torch.uint8)
    for node in range(1, row.new_tokens):
        ancestors[node] |= ancestors[(node - 1) // 2]
    parts = [
        torch.cat([torch.ones(row.new_tokens, p, dtype=torch.uint8), ancestors], 1).flatten() for p in row.prefixes
    ]
    starts = [0, *itertools.accumulate(part.numel() for part in parts)]
    return torch.cat(parts).to(device), torch.tensor(starts, dtype=torch.int64, device=device)


def _make_set(row: Row, device: torch.device, generator: torch.Generator) -> InputSet:
    dtype = getattr(torch, row.dtype)
    pool_dtype = getattr(torch, row.kv_dtype or row.dtype)

    def randn(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, row.head_dim, generator=generator, device=device, dtype=dtype)

    tokens, prefix = row.num_tokens, sum(row.prefixes)
    num_pages = -(-(prefix + tokens + SPARE_SLOTS) // row.page)
    num_slots = num_pages * row.page
    pages = torch.randperm(num_pages, generator=generator, device=device)
    order = (pages[:, None] * row.page + torch.arange(row.page, device=device)).flatten()
    prefix_slots, new_slots, spare = order.split([prefix, tokens, num_slots - prefix - tokens])
    k = randn(tokens, row.num_kv_heads)
    k_pool = randn(num_slots, row.num_kv_heads)
    v = k[..., : row.latent_v] if row.latent_v else randn(tokens, row.num_kv_heads)
    v_pool = k_pool[..., : row.latent_v] if row.latent_v else randn(num_slots, row.num_kv_heads)
    for pool, new in [(k_pool, k)] if row.latent_v else [(k_pool, k), (v_pool, v)]:
        pool[new_slots] = new
        pool[spare] = math.nan
    if pool_dtype != dtype:
        k_pool, v_pool = k_pool.to(pool_dtype), v_pool.to(pool_dtype)
    all_slots = order[:0].view(row.batch, 0)
    if not (row.ragged or row.uneven):
        all_slots = torch.cat([prefix_slots.view(row.batch, -1), new_slots.view(row.batch, -1)], dim=1)
    q = randn(tokens, row.num_q_heads)
    o = q.new_full((tokens, row.num_q_heads, row.head_dim_v), math.nan)
    return InputSet(q, k, v, o, k_pool, v_pool, prefix_slots.clone(), all_slots)
