"""One rank's share of a decoder with random weights: a step over a batch, as a generator that yields each partial sum.

``step`` yields what is to be all-reduced and is sent the sum, so that the same code runs with any all-reduce, on one
rank of many or on all virtual ranks side by side. Modelled: norms, projections, attention over a paged prefix by this
library, the router, experts by grouped products. Left out: embedding, rotary positions, head and sampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Generator, List, Tuple

import torch
import torch.nn.functional as F

from ...attention import extend_attention_fwd
from .shapes import Model

EPS = 1e-6
DTYPE = torch.bfloat16
Step = Generator[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class Batch:
    """``batch`` sequences of ``tokens`` new tokens behind ``prefix`` tokens each, in scattered slots of page size 1."""

    batch: int
    tokens: int
    prefix: int

    def layout(self, device: torch.device) -> Dict[str, Any]:
        """The index arrays of an attention call, and the slots that the new tokens are written to."""
        counts = torch.arange(self.batch + 1, dtype=torch.int32, device=device)
        generator = torch.Generator(device).manual_seed(1)
        order = torch.randperm(self.slots, generator=generator, device=device)
        old = self.batch * self.prefix
        return {
            "qo_indptr": counts * self.tokens,
            "kv_indptr": counts * self.prefix,
            "kv_indices": order[:old],
            "new_slots": order[old : old + self.batch * self.tokens],
        }

    @property
    def slots(self) -> int:
        return self.batch * (self.prefix + self.tokens)


class Layer:
    """Weights and KV pool of one layer on one rank. Sharded weights differ by rank, replicated ones do not."""

    def __init__(self, model: Model, index: int, rank: int, world: int, slots: int, device: torch.device) -> None:
        self.full = model.is_full(index)
        self.head_dim = model.full_head_dim if self.full else model.head_dim
        kv_heads = model.full_kv_heads if self.full else model.kv_heads
        self.heads, self.kv_heads = model.heads // world, max(1, kv_heads // world)
        self.window = -1 if self.full else model.window - 1
        hidden, dense, expert = model.hidden, model.dense_width // world, model.expert_width // world
        own = torch.Generator(device).manual_seed(1000 * index + rank + 1)
        common = torch.Generator(device).manual_seed(1000 * index)

        def weight(generator: torch.Generator, *shape: int) -> torch.Tensor:
            scale = shape[-2] ** -0.5
            return torch.empty(shape, dtype=DTYPE, device=device).normal_(std=scale, generator=generator)

        projections = self.heads + self.kv_heads * (1 if self.full else 2)
        self.qkv = weight(own, hidden, projections * self.head_dim)
        self.o = weight(own, self.heads * self.head_dim, hidden)
        self.gate_up, self.down = weight(own, hidden, 2 * dense), weight(own, dense, hidden)
        self.router = weight(common, hidden, model.experts)
        self.expert_gate_up = weight(own, model.experts, hidden, 2 * expert)
        self.expert_down = weight(own, model.experts, expert, hidden)
        norms = ("attention", "after_attention", "dense", "after_dense", "expert", "after_expert", "after_mlp")
        self.norms = {name: torch.ones(hidden, dtype=DTYPE, device=device) for name in norms}
        self.head_norm = torch.ones(self.head_dim, dtype=DTYPE, device=device)
        pool = (slots, self.kv_heads, self.head_dim)
        self.k_pool = torch.empty(pool, dtype=DTYPE, device=device).normal_(generator=own)
        self.v_pool = self.k_pool if self.full else torch.empty_like(self.k_pool).normal_(generator=own)


class Decoder:
    """One rank's layers, and its step over the batch that ``use`` has set. ``slots``: of each layer's pool."""

    def __init__(self, model: Model, rank: int, world: int, slots: int, device: torch.device) -> None:
        if model.heads % world or model.dense_width % (8 * world) or model.expert_width % (8 * world):
            raise ValueError(f"world: {world} ranks don't divide heads and MLP widths into multiples of 8")
        self.model, self.device = model, device
        self.layers = [Layer(model, i, rank, world, slots, device) for i in range(model.layers)]
        self.expert_numbers = torch.arange(model.experts, device=device)

    def use(self, batch: Batch) -> None:
        """Index arrays and input states, the same on every rank."""
        self.batch, self.layout = batch, batch.layout(self.device)
        rows = batch.batch * batch.tokens
        generator = torch.Generator(self.device).manual_seed(2)
        self.x = torch.empty(rows, self.model.hidden, dtype=DTYPE, device=self.device).normal_(generator=generator)

    def step(self) -> Step:
        """The hidden states ``[batch * tokens, hidden]`` after all layers."""
        x = self.x
        for layer in self.layers:
            x = x + _norm((yield self._attention(layer, _norm(x, layer.norms["attention"]))),
                          layer.norms["after_attention"])  # fmt: skip
            dense = yield _gated(_norm(x, layer.norms["dense"]) @ layer.gate_up) @ layer.down
            expert = yield self._experts(layer, _norm(x, layer.norms["expert"]), x)
            both = _norm(dense, layer.norms["after_dense"]) + _norm(expert, layer.norms["after_expert"])
            x = x + _norm(both, layer.norms["after_mlp"])
        return x

    def _attention(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        rows, dim = x.shape[0], layer.head_dim
        parts = (x @ layer.qkv).view(rows, -1, dim)
        q = F.rms_norm(parts[:, : layer.heads], (dim,), layer.head_norm, EPS)
        k = F.rms_norm(parts[:, layer.heads : layer.heads + layer.kv_heads], (dim,), layer.head_norm, EPS)
        v = k if layer.full else parts[:, layer.heads + layer.kv_heads :].contiguous()
        slots = self.layout["new_slots"]
        layer.k_pool.index_copy_(0, slots, k)
        if not layer.full:
            layer.v_pool.index_copy_(0, slots, v)
        out = torch.empty_like(q)
        extend_attention_fwd(
            q, k, v, out, layer.k_pool, layer.v_pool, self.layout["qo_indptr"], self.layout["kv_indptr"],
            self.layout["kv_indices"], None, True, None, self.batch.tokens, 1.0, 1.0, sm_scale=1.0,
            sliding_window_size=layer.window, max_len_prefix=self.batch.prefix,
        )  # fmt: skip
        return out.view(rows, -1) @ layer.o

    def _experts(self, layer: Layer, x: torch.Tensor, routed_by: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert, two grouped products, and the weighted sum back in token order."""
        rows, per_token = x.shape[0], self.model.experts_per_token
        scores, chosen = torch.topk(_norm(routed_by, None) @ layer.router, per_token, dim=-1)
        shares = torch.softmax(scores.float(), dim=-1).to(x.dtype)
        experts, order = torch.sort(chosen.view(-1), stable=True)
        ends = torch.searchsorted(experts, self.expert_numbers, right=True).to(torch.int32)
        inner = _gated(_grouped(x[order // per_token], layer.expert_gate_up, experts, ends))
        outer = _grouped(inner, layer.expert_down, experts, ends)
        back = torch.empty_like(outer).index_copy_(0, order, outer).view(rows, per_token, -1)
        return (back * shares[..., None]).sum(1)


def _norm(x: torch.Tensor, weight: Any) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def _gated(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def _grouped(x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Row i times the matrix of its expert. torch's grouped product where there is one, else a gather of matrices."""
    if x.is_cuda and hasattr(torch, "_grouped_mm"):
        return torch._grouped_mm(x, weights, offs=ends)
    return torch.bmm(x[:, None], weights[experts])[:, 0]


def lockstep(steps: List[Step], reduce: Any) -> List[torch.Tensor]:
    """Run all ranks' steps side by side; ``reduce(partials) -> sums`` stands between. Returns what the steps return."""
    waiting: List[torch.Tensor] = [next(step) for step in steps]
    while True:
        sums = reduce(waiting)
        ended: List[Tuple[int, torch.Tensor]] = []
        for i, (step, total) in enumerate(zip(steps, sums)):
            try:
                waiting[i] = step.send(total)
            except StopIteration as end:
                ended.append((i, end.value))
        if ended:
            return [value for _, value in ended]
