"""torch.nn.functional.scaled_dot_product_attention, one backend at a time."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, Optional

from ..problems import Row
from .base import Device, Prepared, Provider, Skip, needs_gpu, needs_no_prefix

if TYPE_CHECKING:
    import torch

    from ..data import Batch

BACKENDS = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


class Sdpa(Provider):
    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.name = f"sdpa-{backend}"
        self.what = f"torch SDPA, {BACKENDS[backend]}; rows without a prefix"

    def refuses(self, row: Row, device: Device) -> Optional[str]:
        return needs_gpu(device) or needs_no_prefix(row)

    def prepare(self, batch: Batch, plan: Optional[Any] = None) -> Prepared:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        row = batch.row
        backend = getattr(SDPBackend, BACKENDS[self.backend])
        # The memory-efficient backend has no grouped heads: its keys are repeated before the clock starts.
        repeat = row.num_q_heads // row.num_kv_heads if self.backend == "efficient" else 1

        def heads_first(x: torch.Tensor, times: int = 1) -> torch.Tensor:
            x = x.view(row.batch, row.new_tokens, x.shape[1], x.shape[2])
            return x.repeat_interleave(times, dim=2).transpose(1, 2) if times > 1 else x.transpose(1, 2)

        calls = [(heads_first(s.q), heads_first(s.k, repeat), heads_first(s.v, repeat)) for s in batch.sets]

        def run(i: int) -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(*calls[i], is_causal=True, enable_gqa=repeat == 1)

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                run(0)
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
                why = next((str(w.message).splitlines()[0] for w in said if "because" in str(w.message)), str(error))
                raise Skip(f"this backend refuses the shape: {why.splitlines()[0]}") from None
        return Prepared(
            run=run,
            call=partial(scaled_dot_product_attention, *calls[0], is_causal=True, enable_gqa=repeat == 1),
            rows=lambda out: out.transpose(1, 2).reshape(row.num_tokens, row.num_q_heads, row.head_dim),
            plan={"backend": self.backend, "beforehand": "KV heads repeated" if repeat > 1 else ""},
        )
