"""The demo's story: a serving engine's KV pool, a long prompt prefilled in chunks, then draft verification in a batch.

Only tensors and index arrays are made here; what is called with them, timed and checked is demo.py's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional

import torch

# Gemma-4's attention as one of two tensor-parallel ranks holds it; models pass their window - 1.
HEAD_DIM, NUM_Q_HEADS, NUM_KV_HEADS = 256, 8, 4


@dataclass(frozen=True)
class Scale:
    """Sizes of the story, in tokens; ``window`` is the model's (1024: a query sees itself and 1023 before it)."""

    prompt: int = 8192
    chunk: int = 2048
    batch: int = 32
    draft: int = 4
    window: int = 1024
    shortest_prefix: int = 1000
    longest_prefix: int = 8000

    def num_steps(self) -> int:
        """Steps of one layer: the chunks of the prompt and one verification."""
        return -(-self.prompt // self.chunk) + 1


FULL = Scale()
SMALL = Scale(prompt=512, chunk=128, batch=4, draft=4, window=64, shortest_prefix=60, longest_prefix=500)


@dataclass(frozen=True)
class Layer:
    """A kind of attention layer: its name and what it passes as ``sliding_window_size``."""

    name: str
    sliding_window_size: int


def layers(scale: Scale) -> List[Layer]:
    return [Layer(f"window {scale.window}", scale.window - 1), Layer("full", -1)]


class KvPool:
    """A KV pool of page size 1: any token may lie in any slot. Slots without a token are NaN: a stray read shows."""

    def __init__(self, slots: int, dtype: torch.dtype, generator: torch.Generator):
        device = generator.device
        self.k = torch.full((slots, NUM_KV_HEADS, HEAD_DIM), float("nan"), dtype=dtype, device=device)
        self.v = torch.full_like(self.k, float("nan"))
        self._free = torch.randperm(slots, generator=generator, device=device)  # random order

    def store(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Put tokens ``[n, Hkv, D]`` into free slots; returns the slots, in the tokens' order."""
        slots, self._free = self._free[: len(k)], self._free[len(k) :]
        self.k[slots], self.v[slots] = k, v
        return slots


@dataclass(frozen=True)
class Step:
    """One attention call: its arguments but ``o_extend``, and the lengths its work is counted from (on the host)."""

    name: str
    layer: Layer
    arguments: Dict[str, Any]
    prefix_lens: List[int]
    extend_lens: List[int]

    @property
    def is_prefill(self) -> bool:
        return len(self.extend_lens) == 1

    def shape(self) -> str:
        """batch x new tokens, after which prefix."""
        shortest, longest = min(self.prefix_lens), max(self.prefix_lens)
        after = f"{longest}" if shortest == longest else f"{shortest}..{longest}"
        return f"{len(self.extend_lens)} x {self.extend_lens[0]} after {after}"

    def flops(self) -> int:
        """Floating point operations of the query-key pairs that are seen."""
        pairs = 0
        for prefix, extend in zip(self.prefix_lens, self.extend_lens):
            seen = torch.arange(prefix + 1, prefix + extend + 1, dtype=torch.int64)  # keys up to each row's own
            if self.layer.sliding_window_size > 0:
                seen = seen.clamp(max=self.layer.sliding_window_size + 1)
            pairs += int(seen.sum())
        return pairs * NUM_Q_HEADS * 2 * (HEAD_DIM + HEAD_DIM)

    def bytes(self) -> int:
        """Bytes that must move once: queries, output, new keys and values, the prefix that is seen, its slots."""
        window = self.layer.sliding_window_size
        prefix = sum(min(p, window) if window > 0 else p for p in self.prefix_lens)
        extend = sum(self.extend_lens)
        element = self.arguments["q_extend"].element_size()
        rows = 2 * extend * NUM_Q_HEADS + 2 * (prefix + extend) * NUM_KV_HEADS
        return rows * HEAD_DIM * element + prefix * 8


def steps(layer: Layer, scale: Scale, dtype: torch.dtype, device: torch.device, seed: int) -> Iterator[Step]:
    """The story of one layer. The pool fills as it goes on, so a step must be done before the next is asked for."""
    generator = torch.Generator(device=device).manual_seed(seed)
    others = [p - p % 2 for p in _spread(scale.shortest_prefix, scale.longest_prefix, scale.batch - 1)]
    used = scale.prompt + sum(others)
    pool = KvPool(used + used // 8, dtype, generator)
    other_slots = [pool.store(*_tokens(p, dtype, generator)) for p in others]  # sequences that were there before

    prompt_slots = torch.empty(0, dtype=torch.int64, device=device)
    for begin in range(0, scale.prompt, scale.chunk):
        extend = min(scale.chunk, scale.prompt - begin)
        step = _step(f"prefill {begin // scale.chunk + 1}", layer, pool, [prompt_slots], extend, dtype, generator)
        yield step
        new = pool.store(step.arguments["k_extend"], step.arguments["v_extend"])
        prompt_slots = torch.cat([prompt_slots, new])

    yield _step("verify", layer, pool, [prompt_slots, *other_slots], scale.draft, dtype, generator)


def _spread(first: int, last: int, count: int) -> List[int]:
    """``count`` lengths from first to last, evenly."""
    return [first + (last - first) * i // max(1, count - 1) for i in range(count)]


def _tokens(n: int, dtype: torch.dtype, generator: torch.Generator, heads: int = NUM_KV_HEADS, count: int = 2):
    shape = (n, heads, HEAD_DIM)
    return [torch.randn(shape, generator=generator, device=generator.device).to(dtype) for _ in range(count)]


def _step(
    name: str,
    layer: Layer,
    pool: KvPool,
    slots: List[torch.Tensor],
    extend: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Step:
    device = generator.device
    prefix_lens = [len(s) for s in slots]
    rows = extend * len(slots)
    (q,) = _tokens(rows, dtype, generator, NUM_Q_HEADS, count=1)
    k, v = _tokens(rows, dtype, generator)
    qo_indptr = torch.arange(0, rows + 1, extend, dtype=torch.int32, device=device)
    kv_indptr = torch.tensor([0, *prefix_lens], dtype=torch.int64).cumsum(0).to(device=device, dtype=torch.int32)
    arguments: Dict[str, Any] = dict(
        q_extend=q,
        k_extend=k,
        v_extend=v,
        k_buffer=pool.k,
        v_buffer=pool.v,
        qo_indptr=qo_indptr,
        kv_indptr=kv_indptr,
        kv_indices=torch.cat(slots),
        custom_mask=None,
        is_causal=True,
        mask_indptr=None,
        max_len_extend=extend,
        k_scale=1.0,
        v_scale=1.0,
        sliding_window_size=layer.sliding_window_size,
    )
    return Step(name, layer, arguments, prefix_lens, [extend] * len(slots))


def scaled(scale: Scale, prompt: Optional[int], chunk: Optional[int], batch: Optional[int]) -> Scale:
    """The same story with other sizes; None keeps a size."""
    changes = {"prompt": prompt, "chunk": chunk, "batch": batch}
    return Scale(**{**scale.__dict__, **{k: v for k, v in changes.items() if v is not None}})
