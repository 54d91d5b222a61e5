"""FlashAttention 4 (CuTe DSL), from an installed flash-attn-4: contiguous new tokens, prefixes in pages of 128."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any, Dict, Optional

from ..problems import Row
from .base import Device, Prepared, Provider, import_peer, needs_gpu, needs_plain

if TYPE_CHECKING:
    import torch

    from ..data import Batch

MODULE, PACKAGE = "flash_attn.cute", "flash-attn-4"
PAGE = 128
LARGEST_HEAD_DIM = 256


class FlashAttention4(Provider):
    name = "fa4"
    what = f"FlashAttention 4, prefixes in pages of {PAGE}"

    def refuses(self, row: Row, device: Device) -> Optional[str]:
        if needs_gpu(device) or not row.plain:
            return needs_gpu(device) or needs_plain(row)
        if device.capability is None or device.capability[0] < 9:
            return f"FlashAttention 4 is for compute capability 9.0 and later, this is {device.capability}"
        if row.head_dim > LARGEST_HEAD_DIM:
            return f"FlashAttention 4 stops at head dim {LARGEST_HEAD_DIM}"
        return "FlashAttention 4 takes 16-bit types" if row.dtype == "float32" else None

    def prepare(self, batch: Batch, plan: Optional[Any] = None) -> Prepared:
        import torch

        attention = import_peer(MODULE, PACKAGE).flash_attn_varlen_func
        row = batch.row
        length = row.prefix + row.new_tokens
        used = torch.full((row.batch,), length, dtype=torch.int32, device=batch.device)
        pages = [batch.pages(i, PAGE) for i in range(len(batch.sets))] if row.prefix else []
        options = dict(
            cu_seqlens_q=batch.qo_indptr, max_seqlen_q=row.new_tokens, max_seqlen_k=length, causal=True,
            softmax_scale=row.head_dim**-0.5, window_size=(row.window, 0) if row.window else (None, None),
        )  # fmt: skip

        def run(i: int) -> torch.Tensor:
            one = batch.sets[i]
            if row.prefix:
                k, v, table = pages[i]
                result = attention(one.q, k, v, seqused_k=used, page_table=table, **options)
            else:
                result = attention(one.q, one.k, one.v, cu_seqlens_k=batch.qo_indptr, **options)
            return result[0] if isinstance(result, tuple) else result

        return Prepared(run=run, plan={"page_size": PAGE if row.prefix else None}, keep=[pages, used])

    def versions(self) -> Dict[str, str]:
        try:
            return {"fa4": metadata.version(PACKAGE)}
        except metadata.PackageNotFoundError:
            return {}
