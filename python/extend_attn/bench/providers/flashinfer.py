"""FlashInfer's paged prefill on the bench's pool, at page size 1. Planned beforehand, as an engine does once a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Optional

from ..problems import Row
from .base import Device, Prepared, Provider, Skip, import_peer, needs_gpu, needs_plain

if TYPE_CHECKING:
    import torch

    from ..data import Batch

WORKSPACE_BYTES = 256 << 20
LARGEST_HEAD_DIM = 256


class FlashInfer(Provider):
    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.name = f"flashinfer-{backend}"
        self.what = f"FlashInfer paged prefill, backend {backend}, page size 1"

    def refuses(self, row: Row, device: Device) -> Optional[str]:
        if needs_gpu(device) or not row.plain:
            return needs_gpu(device) or needs_plain(row)
        if row.head_dim > LARGEST_HEAD_DIM:
            return f"FlashInfer has no kernel past head dim {LARGEST_HEAD_DIM}"
        if row.dtype == "float32":
            return "FlashInfer takes 16-bit types"
        if self.backend == "fa3" and (device.capability is None or device.capability[0] != 9):
            return f"its fa3 backend is for compute capability 9.x, this is {device.capability}"
        return None

    def prepare(self, batch: Batch, plan: Optional[Any] = None) -> Prepared:
        import torch

        flashinfer = import_peer("flashinfer", "flashinfer")
        row = batch.row
        length = row.prefix + row.new_tokens
        indptr = torch.arange(row.batch + 1, dtype=torch.int32, device=batch.device) * length
        last_page = torch.ones(row.batch, dtype=torch.int32, device=batch.device)
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=batch.device)
        dtype = getattr(torch, row.dtype)
        wrappers, pools = [], []
        for one in batch.sets:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=self.backend)
            try:
                wrapper.plan(
                    batch.qo_indptr, indptr, one.all_slots.reshape(-1).to(torch.int32), last_page, row.num_q_heads,
                    row.num_kv_heads, row.head_dim, 1, causal=True, window_left=batch.window, q_data_type=dtype,
                    kv_data_type=dtype,
                )  # fmt: skip
            except Exception as error:
                if type(error).__name__ == "MissingJITCacheError":  # it may not compile, and was not compiled before
                    raise Skip("flashinfer: this kernel is not built, and FLASHINFER_DISABLE_JIT is set") from None
                raise
            wrappers.append(wrapper)
            pools.append((one.k_pool.unsqueeze(1), one.v_pool.unsqueeze(1)))

        def run(i: int) -> torch.Tensor:
            return wrappers[i].run(batch.sets[i].q, pools[i], out=batch.sets[i].o)

        return Prepared(run=run, plan={"page_size": 1, "backend": self.backend}, keep=[workspace, wrappers])

    def versions(self) -> Dict[str, str]:
        try:
            return {"flashinfer": import_peer("flashinfer", "flashinfer").__version__}
        except Skip:
            return {}
