"""Providers of attention by name: the library and, where they are installed, its peers."""

from __future__ import annotations

from typing import Dict, List, Optional

from .base import OWN, Device, Prepared, Provider, Skip
from .flash_attention import FlashAttention3
from .flash_attention_4 import FlashAttention4
from .flashinfer import FlashInfer
from .flex import Flex
from .ours import Ours
from .sdpa import Sdpa
from .sglang import Sglang
from .vllm import VllmTriton

__all__ = ["OWN", "PROVIDERS", "Device", "Prepared", "Provider", "Skip", "providers_named"]

PROVIDERS: Dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Ours(),
        Sglang("tuned"),
        Sglang("legacy"),
        Sglang("installed"),
        FlashAttention3(page_size=64),
        FlashAttention3(page_size=1),
        FlashAttention4(),
        FlashInfer("fa2"),
        FlashInfer("fa3"),
        VllmTriton(),
        Sdpa("cudnn"),
        Sdpa("flash"),
        Sdpa("efficient"),
        Flex(),
    )
}

# What runs when nothing is named. SGLang's other tiles answer the question of --finding, and flex_attention compiles
# for half a minute a row.
DEFAULT = [name for name in PROVIDERS if name not in ("sglang-legacy", "sglang-installed", "fa3-page1", "flex")]


def providers_named(names: Optional[str]) -> List[str]:
    """Names for ``--providers``: from PROVIDERS, or ``all``, separated by commas. None: the default ones."""
    if names is None:
        return list(DEFAULT)
    chosen: List[str] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name != "all" and name not in PROVIDERS:
            raise ValueError(f"providers: {name!r} is none of all, {', '.join(PROVIDERS)}")
        chosen.extend(one for one in (PROVIDERS if name == "all" else [name]) if one not in chosen)
    return chosen
