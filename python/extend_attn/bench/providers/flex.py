"""torch's flex_attention, compiled. It has no page table: keys are gathered beforehand, and the plan says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

from ..problems import Row
from .base import Device, Prepared, Provider, needs_gpu, needs_plain

if TYPE_CHECKING:
    from ..data import Batch


class Flex(Provider):
    name = "flex"
    what = "torch flex_attention, compiled; keys gathered beforehand"

    def refuses(self, row: Row, device: Device) -> Optional[str]:
        return needs_gpu(device) or needs_plain(row)

    def prepare(self, batch: Batch, plan: Optional[Any] = None) -> Prepared:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        row = batch.row
        prefix, window, keys = row.prefix, row.window, row.prefix + row.new_tokens

        def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
            seen = kv <= q + prefix
            return seen & (q + prefix <= kv + window) if window else seen

        mask = create_block_mask(visible, None, None, row.new_tokens, keys, device=batch.device)
        compiled = torch.compile(flex_attention, dynamic=False)
        calls = []
        for i, one in enumerate(batch.sets):
            k, v = batch.gathered(i)
            q = one.q.view(row.batch, row.new_tokens, row.num_q_heads, row.head_dim)
            calls.append((q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))

        return Prepared(
            run=lambda i: compiled(*calls[i], block_mask=mask, enable_gqa=True),
            rows=lambda out: out.transpose(1, 2).reshape(row.num_tokens, row.num_q_heads, row.head_dim),
            plan={"beforehand": "keys gathered" if prefix else ""},
        )
