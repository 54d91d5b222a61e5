"""Tensors that pose a given Problem: equal sequences at its bounds, everything that nobody may read poisoned."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import List, Optional, Tuple

import torch

from ... import reference
from ...inputs import Inputs
from ...problem import ELEMENT_SIZE, Problem
from ..providers.base import Skip
from ..timing import rotations

SPARE_SLOTS = 64  # slots that no sequence owns
# Bytes of all sets' pools together. ``num_kv_indices`` may be the length of a preallocated array and ask for more: the
# prefixes are shortened then, and the array keeps its length.
MOST_POOL_BYTES = 8 << 30


@dataclass
class Posed:
    """Sets of one problem's inputs, alike in all but values and slots. ``new`` and ``prefix`` are tokens a sequence."""

    problem: Problem
    new: int
    prefix: int
    sets: List[Inputs]
    _expected: Optional[torch.Tensor] = field(default=None, repr=False)

    def expected(self) -> torch.Tensor:
        """The reference's fp32 answer to set 0, computed once."""
        if self._expected is None:
            first = self.sets[0]
            out = torch.full_like(first.o, math.nan, dtype=torch.float32)
            reference.run(first._replace(o=out, lse=None if first.lse is None else torch.empty_like(first.lse)))
            self._expected = out
        return self._expected

    def poison(self) -> None:
        """NaN in every output, so that an element that is not written cannot pass for a right one."""
        for one in self.sets:
            one.o.fill_(math.nan)


def lengths_of(problem: Problem) -> Tuple[int, int]:
    """(new tokens, prefix tokens) of each sequence: an equal share of what the problem has, within its bounds."""
    p = problem
    if p.batch_size == 0:
        return 0, 0
    new = min(p.max_len_extend, p.num_tokens // p.batch_size)
    prefix = p.num_kv_indices // p.batch_size - (new if p.unified else 0)
    if p.max_len_prefix is not None:
        prefix = min(prefix, p.max_len_prefix)
    return new, max(0, prefix)


def pose(problem: Problem, device: torch.device, *, num_sets: Optional[int] = None, seed: int = 0) -> Posed:
    """Random inputs; as many sets as leave nothing warm in the L2. Skip if the problem has nothing to compute."""
    new, prefix = lengths_of(problem)
    if new == 0:
        raise Skip("the problem has no new tokens")
    slot_bytes = ELEMENT_SIZE[problem.kv_dtype] * problem.num_kv_heads * (problem.head_dim_qk + problem.head_dim_v)
    if num_sets is None:
        keys = new + (min(prefix, problem.sliding_window) if problem.sliding_window > 0 else prefix)
        l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1
        num_sets = rotations(problem.batch_size * keys * slot_bytes, l2)
    prefix = min(prefix, MOST_POOL_BYTES // (num_sets * slot_bytes * problem.batch_size))
    generator = torch.Generator(device).manual_seed(seed)
    sets = [_Set(problem, device, generator, new, prefix).inputs() for _ in range(num_sets)]
    if sets[0].problem().key() != problem.key():
        raise Skip(f"the problem can't be posed: its tensors would be {sets[0].problem()}")
    return Posed(problem, new, prefix, sets)


class _Set:
    def __init__(
        self, problem: Problem, device: torch.device, generator: torch.Generator, new: int, prefix: int
    ) -> None:
        self.p, self.device, self.generator, self.new, self.prefix = problem, device, generator, new, prefix

    def rows(self, count: int, heads: int, dim: int, dtype: str) -> torch.Tensor:
        """Random rows; the query's address has the problem's alignment and no more."""
        values = torch.randn(count, heads, dim, generator=self.generator, device=self.device)
        return values.to(getattr(torch, dtype))

    def misaligned(self, rows: torch.Tensor) -> torch.Tensor:
        offset = self.p.alignment // rows.element_size() if self.p.alignment < 16 else 0
        flat = torch.empty(rows.numel() + offset, dtype=rows.dtype, device=self.device)
        return flat[offset:].view(rows.shape).copy_(rows)

    def value(self, k: Optional[torch.Tensor], aliases: bool, dtype: str) -> Optional[torch.Tensor]:
        if k is None:
            return None
        if aliases:
            return k[..., : self.p.head_dim_v]
        return self.rows(k.shape[0], self.p.num_kv_heads, self.p.head_dim_v, dtype)

    def indptr(self, each: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.arange(self.p.batch_size + 1, dtype=dtype, device=self.device) * each

    def inputs(self) -> Inputs:
        p, batch = self.p, self.p.batch_size
        listed = self.prefix + (self.new if p.unified else 0)
        k_new = None if p.unified else self.rows(p.num_tokens, p.num_kv_heads, p.head_dim_qk, p.dtype)
        k_pool, v_pool, slots = self.pool(batch * listed)
        q = self.misaligned(self.rows(p.num_tokens, p.num_q_heads, p.head_dim_qk, p.dtype))
        mask, mask_indptr = self.mask()
        lens = dict(dtype=torch.int32, device=self.device)
        positions = self.prefix + torch.arange(self.new, **lens)
        return Inputs(
            q=q,
            k_new=k_new,
            v_new=self.value(k_new, p.v_aliases_k_new, p.dtype),
            o=torch.full((*q.shape[:2], p.head_dim_v), math.nan, dtype=getattr(torch, p.out_dtype), device=self.device),
            k_pool=k_pool,
            v_pool=v_pool,
            qo_indptr=self.indptr(self.new),
            kv_indptr=self.indptr(listed),
            kv_indices=slots,
            prefix_lens=torch.full((batch,), self.prefix, **lens) if p.unified else None,
            custom_mask=mask,
            mask_indptr=mask_indptr,
            sinks=torch.randn(p.num_q_heads, generator=self.generator, device=self.device) if p.sinks else None,
            window_offsets=torch.zeros(batch, **lens) if p.window_offsets else None,
            q_positions=positions.repeat(-(-p.num_tokens // self.new))[: p.num_tokens] if p.q_positions else None,
            lse=torch.empty(p.num_tokens, p.num_q_heads, device=self.device) if p.return_lse else None,
            batch_size=batch,
            max_len_extend=p.max_len_extend,
            max_len_prefix=p.max_len_prefix,
            sm_scale=p.head_dim_qk**-0.5,
            k_scale=1.0,
            v_scale=1.0,
            logit_cap=p.logit_cap,
            xai_temperature_len=p.xai_temperature_len,
            sliding_window=p.sliding_window,
            is_causal=p.is_causal,
            mask_prefix=p.mask_prefix,
        )

    def pool(self, used: int) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor], torch.Tensor]:
        """Pools with NaN where no sequence owns the slot, and the slots in random order."""
        p = self.p
        index_dtype = getattr(torch, p.index_dtype)
        slots = torch.zeros(p.num_kv_indices, dtype=index_dtype, device=self.device)
        if p.num_kv_indices == 0 and not p.unified:
            return None, None, slots
        order = torch.randperm(used + SPARE_SLOTS, generator=self.generator, device=self.device)
        slots[:used] = order[:used].to(index_dtype)
        k = self.rows(used + SPARE_SLOTS, p.num_kv_heads, p.head_dim_qk, p.kv_dtype)
        v = self.value(k, p.v_aliases_k_pool, p.kv_dtype)
        for pool in (k, v):
            if pool.element_size() == 1:  # codes: all ones but the sign is NaN
                pool.view(torch.uint8)[order[used:]] = 0x7F
            else:
                pool[order[used:]] = math.nan
        return k, v, slots

    def mask(self) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
        """Three of four keys, each new token itself among them."""
        p = self.p
        if not p.custom_mask:
            return None, None
        shape = (p.batch_size, self.new, self.prefix + self.new)
        mask = torch.randint(0, 4, shape, generator=self.generator, device=self.device) > 0
        mask[:, :, self.prefix :].diagonal(dim1=1, dim2=2).fill_(True)
        return mask.flatten(), self.indptr(self.new * (self.prefix + self.new), torch.int64)
