"""Tensors of a row: several input sets over one layout, with everything that nobody may read poisoned with NaN.

The pool also holds the new tokens, in slots that the two-stage index array does not name: peers that read everything
through a page table find prefix and new tokens there, and every provider works on the same bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import List, Optional

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
    all_slots: torch.Tensor  # [B, prefix + new] int64: the slots of prefix and new tokens


@dataclass
class Batch:
    """A row's input sets and the layout they share."""

    row: Row
    device: torch.device
    qo_indptr: torch.Tensor  # [B + 1] int32
    kv_indptr: torch.Tensor  # [B + 1] int32, prefix only
    sets: List[InputSet]
    _expected: Optional[torch.Tensor] = field(default=None, repr=False)

    @property
    def window(self) -> int:
        """``sliding_window_size`` as the library takes it."""
        return self.row.window or -1

    def expected(self) -> torch.Tensor:
        """The reference's fp32 answer to set 0, computed once."""
        if self._expected is None:
            first = self.sets[0]
            out = torch.full_like(first.o, math.nan, dtype=torch.float32)
            reference.extend_attention_fwd(
                first.q, first.k, first.v, out, first.k_pool, first.v_pool,
                self.qo_indptr, self.kv_indptr, first.prefix_slots, None, True, None, self.row.new_tokens, 1.0, 1.0,
                sliding_window_size=self.window,
            )  # fmt: skip
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


def make_batch(row: Row, device: torch.device, *, num_sets: Optional[int] = None, seed: int = 0) -> Batch:
    """Random tensors for a row; enough sets that a rotation over them leaves nothing warm in the L2."""
    if num_sets is None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_L2
        num_sets = rotations(row.bytes, l2)
    generator = torch.Generator(device=device).manual_seed(seed)
    counts = torch.arange(row.batch + 1, dtype=torch.int32, device=device)
    return Batch(
        row=row,
        device=device,
        qo_indptr=counts * row.new_tokens,
        kv_indptr=counts * row.prefix,
        sets=[_make_set(row, device, generator) for _ in range(num_sets)],
    )


def _make_set(row: Row, device: torch.device, generator: torch.Generator) -> InputSet:
    options = dict(device=device, dtype=getattr(torch, row.dtype))

    def randn(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, row.head_dim, generator=generator, **options)

    tokens, prefix = row.num_tokens, row.batch * row.prefix
    num_slots = prefix + tokens + SPARE_SLOTS
    order = torch.randperm(num_slots, generator=generator, device=device)
    prefix_slots, new_slots, spare = order.split([prefix, tokens, SPARE_SLOTS])
    k, v = randn(tokens, row.num_kv_heads), randn(tokens, row.num_kv_heads)
    k_pool, v_pool = randn(num_slots, row.num_kv_heads), randn(num_slots, row.num_kv_heads)
    for pool, new in ((k_pool, k), (v_pool, v)):
        pool[new_slots] = new
        pool[spare] = math.nan
    all_slots = torch.cat([prefix_slots.view(row.batch, -1), new_slots.view(row.batch, -1)], dim=1)
    q = randn(tokens, row.num_q_heads)
    return InputSet(q, k, v, torch.full_like(q, math.nan), k_pool, v_pool, prefix_slots.clone(), all_slots)
