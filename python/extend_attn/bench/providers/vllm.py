"""vLLM's unified Triton attention, from an installed vllm, over pages of 16 that are filled before the clock starts."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Dict, Optional

from ..problems import Row
from .base import Device, Prepared, Provider, Skip, import_peer, needs_gpu, needs_plain

if TYPE_CHECKING:
    import torch

    from ..data import Batch

MODULE = "vllm.v1.attention.ops.triton_unified_attention"
PAGE = 16
# What vLLM's backend allocates: it splits the keys of decoding batches so, up to so many programs.
SEGMENTS, MOST_PROGRAMS = 16, 128


class VllmTriton(Provider):
    name = "vllm-triton"
    what = f"vLLM's unified Triton attention, keys in pages of {PAGE}"

    def refuses(self, row: Row, device: Device) -> Optional[str]:
        return needs_gpu(device) or needs_plain(row)

    def prepare(self, batch: Batch, plan: Optional[Any] = None) -> Prepared:
        import torch

        attention = import_peer(MODULE, "vllm").unified_attention
        row = batch.row
        length = row.prefix + row.new_tokens
        lengths = torch.full((row.batch,), length, dtype=torch.int32, device=batch.device)
        pages = [batch.pages(i, PAGE) for i in range(len(batch.sets))]
        threshold = MOST_PROGRAMS // row.num_kv_heads
        width = 1 << (row.head_dim - 1).bit_length()
        sums = dict(dtype=torch.float32, device=batch.device)
        parts = [torch.empty(threshold, row.num_q_heads, SEGMENTS, *last, **sums) for last in ((width,), (), ())]
        window = (row.window, 0) if row.window else (-1, -1)

        def run(i: int) -> torch.Tensor:
            one, (k, v, table) = batch.sets[i], pages[i]
            attention(
                one.q, k, v, one.o, batch.qo_indptr, row.new_tokens, lengths, length, row.head_dim**-0.5, True,
                window, table, 0.0, None, None, None, threshold, SEGMENTS, *parts,
            )  # fmt: skip
            return one.o

        return Prepared(run=run, plan={"page_size": PAGE}, keep=[pages, parts])

    def versions(self) -> Dict[str, str]:
        try:
            import_peer(MODULE, "vllm")
            return {"vllm": str(getattr(import_module("vllm"), "__version__", ""))}
        except Skip:
            return {}
