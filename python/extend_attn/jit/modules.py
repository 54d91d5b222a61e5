"""Loading the C++/CUDA module."""

from __future__ import annotations

from types import ModuleType
from typing import Optional, Sequence


def load_comm_module(
    *,
    archs: Optional[Sequence[str]] = None,
    world_sizes: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
    dtypes: Sequence[str] = ("float16", "bfloat16", "float32"),
) -> ModuleType:
    """The pybind11 module ``extend_attn._comm`` with kernels for ``archs`` (``("9.0",)``; None: the GPUs' own), ``world_sizes`` and
    ``dtypes``: an installed build that has them, else one from the cache, else it is compiled now."""
    raise NotImplementedError
