"""The model of the decoder-step bench: its published shapes, and what they come to. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict


@dataclass(frozen=True)
class Model:
    """A decoder of alternating windowed and full attention, each layer with a dense and an expert MLP side by side."""

    hidden: int
    layers: int
    full_every: int  # each so manieth layer has full attention
    heads: int
    kv_heads: int
    head_dim: int
    full_kv_heads: int  # of full-attention layers, whose values are their keys
    full_head_dim: int
    window: int  # tokens that a windowed layer sees
    dense_width: int
    experts: int
    experts_per_token: int
    expert_width: int

    # Each of attention, dense MLP and experts ends in a norm of its own before it is added, so none of the three sums
    # can wait for another.
    ALL_REDUCES_A_LAYER = 3

    @property
    def all_reduces(self) -> int:
        """Calls a step."""
        return self.layers * self.ALL_REDUCES_A_LAYER

    def is_full(self, layer: int) -> bool:
        return (layer + 1) % self.full_every == 0


MODELS: Dict[str, Model] = {
    # google/gemma-4-26B-A4B, config.json. With its embedding of 262144 words these come to the published 25.2 B.
    "gemma-4-26b-a4b": Model(
        hidden=2816, layers=30, full_every=6, heads=16, kv_heads=8, head_dim=256, full_kv_heads=2, full_head_dim=512,
        window=1024, dense_width=2112, experts=128, experts_per_token=8, expert_width=704,
    ),
    # For machines without a GPU: the same kinds of layers.
    "tiny": Model(
        hidden=64, layers=2, full_every=2, heads=4, kv_heads=2, head_dim=16, full_kv_heads=2, full_head_dim=32,
        window=8, dense_width=32, experts=4, experts_per_token=2, expert_width=16,
    ),
}  # fmt: skip
