"""FlashAttention 3: from its own package, or from the op library inside vLLM's wheel.

The library is looked for where EXTEND_ATTN_BENCH_FA3 points (a ``_vllm_fa3_C*.so``), then as ``flash_attn_interface``,
then inside an installed vllm. Prefixes are read through a page table, with pages of 64 as FlashAttention likes them
(``fa3``; the pages are filled before the clock starts) or from the bench's own pool at page size 1 (``fa3-page1``).
Scheduler metadata is computed beforehand, as an engine does once a step.
"""

from __future__ import annotations

import glob
import os
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Dict, NamedTuple, Optional

from ..problems import Row
from .base import Device, Prepared, Provider, Skip, needs_gpu, needs_plain

if TYPE_CHECKING:
    import torch

    from ..data import Batch

LIBRARY = "EXTEND_ATTN_BENCH_FA3"
LARGEST_HEAD_DIM = 256


class Keys(NamedTuple):
    """What FlashAttention reads of one input set: contiguous rows, or pages and their table."""

    k: torch.Tensor
    v: torch.Tensor
    page_table: Optional[torch.Tensor]


class FlashAttention3(Provider):
    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.name = "fa3" if page_size == 64 else f"fa3-page{page_size}"
        self.what = f"FlashAttention 3, prefixes in pages of {page_size}"

    def refuses(self, row: Row, device: Device) -> Optional[str]:
        if needs_gpu(device) or not row.plain:
            return needs_gpu(device) or needs_plain(row)
        if device.capability is None or device.capability[0] != 9:
            return f"FlashAttention 3 is for compute capability 9.x, this is {device.capability}"
        if row.head_dim > LARGEST_HEAD_DIM:
            return f"FlashAttention 3 stops at head dim {LARGEST_HEAD_DIM}"
        if row.dtype == "float32":
            return "FlashAttention 3 takes 16-bit types"
        return "the same as fa3 without a prefix" if self.page_size != 64 and not row.prefix else None

    def prepare(self, batch: Batch, plan: Optional[Any] = None) -> Prepared:
        import torch

        backend = _load()
        row = batch.row
        counts = torch.arange(row.batch + 1, dtype=torch.int32, device=batch.device)
        call = Call(
            row=row,
            cu_seqlens_q=batch.qo_indptr,
            cu_seqlens_k=counts * (row.prefix + row.new_tokens),
            seqused_k=torch.full((row.batch,), row.prefix + row.new_tokens, dtype=torch.int32, device=batch.device),
            page_size=self.page_size if row.prefix else None,
        )
        keys = [keys_of(batch, i, self.page_size) for i in range(len(batch.sets))]
        metadata = backend.metadata(call)

        def run(i: int) -> torch.Tensor:
            one = batch.sets[i]
            return backend.forward(call, one.q, keys[i], one.o, metadata)

        return Prepared(run=run, plan={"page_size": call.page_size, "library": backend.where}, keep=[keys])

    def versions(self) -> Dict[str, str]:
        try:
            return {"fa3": _load().where}
        except Skip:
            return {}


class Call(NamedTuple):
    """A row as FlashAttention takes it, the tensors of a set excepted."""

    row: Row
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    seqused_k: torch.Tensor
    page_size: Optional[int]

    @property
    def max_seqlen_k(self) -> int:
        return self.row.prefix + self.row.new_tokens

    @property
    def window(self) -> tuple:
        return (self.row.window, 0) if self.row.window else (-1, -1)


def keys_of(batch: Batch, index: int, page_size: int) -> Keys:
    """Contiguous rows where there is no prefix; else pages in random order (of 1: the bench's own pool)."""
    import torch

    one, row = batch.sets[index], batch.row
    if not row.prefix:
        return Keys(one.k, one.v, None)
    if page_size == 1:
        return Keys(one.k_pool.unsqueeze(1), one.v_pool.unsqueeze(1), one.all_slots.to(torch.int32))
    return Keys(*batch.pages(index, page_size))


class _OpLibrary:
    """The op library of vLLM's wheel: two ops, called by the argument names of their schemas."""

    def __init__(self, path: str) -> None:
        import torch

        torch.ops.load_library(path)
        self.ops = torch.ops._vllm_fa3_C
        self.where = os.path.basename(path)

    def metadata(self, call: Call) -> torch.Tensor:
        import torch

        row = call.row
        return self.ops.get_scheduler_metadata(
            batch_size=row.batch, max_seqlen_q=row.new_tokens, max_seqlen_k=call.max_seqlen_k,
            num_heads=row.num_q_heads, num_heads_k=row.num_kv_heads, headdim=row.head_dim, headdim_v=row.head_dim,
            qkv_dtype=getattr(torch, row.dtype), seqused_k=call.seqused_k, cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, leftpad_k=None, page_size=call.page_size,
            max_seqlen_k_new=0, is_causal=True, window_size_left=call.window[0], window_size_right=call.window[1],
            has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0,
        )  # fmt: skip

    def forward(self, call: Call, q: torch.Tensor, keys: Keys, out: torch.Tensor, metadata: Any) -> torch.Tensor:
        paged = keys.page_table is not None
        return self.ops.fwd(
            q=q, k=keys.k, v=keys.v, k_new=None, v_new=None, q_v=None, out=out, cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=None if paged else call.cu_seqlens_k, cu_seqlens_k_new=None, seqused_q=None,
            seqused_k=call.seqused_k if paged else None, max_seqlen_q=call.row.new_tokens,
            max_seqlen_k=call.max_seqlen_k, page_table=keys.page_table, kv_batch_idx=None, leftpad_k=None,
            rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None,
            softmax_scale=call.row.head_dim**-0.5, is_causal=True, window_size_left=call.window[0],
            window_size_right=call.window[1], softcap=0.0, is_rotary_interleaved=True, scheduler_metadata=metadata,
            num_splits=0, pack_gqa=None, sm_margin=0, s_aux=None, cp_world_size=1, cp_rank=0, cp_tot_seqused_k=None,
        )[0]  # fmt: skip


class _Package:
    """FlashAttention's own package for Hopper."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.where = f"flash_attn_interface {getattr(module, '__version__', '')}".strip()

    def metadata(self, call: Call) -> Any:
        if call.page_size is None:
            return None  # its varlen function takes none
        import torch

        row = call.row
        return self.module.get_scheduler_metadata(
            row.batch, row.new_tokens, call.max_seqlen_k, row.num_q_heads, row.num_kv_heads, row.head_dim,
            call.seqused_k, qkv_dtype=getattr(torch, row.dtype), cu_seqlens_q=call.cu_seqlens_q,
            page_size=call.page_size, causal=True, window_size=call.window,
        )  # fmt: skip

    def forward(self, call: Call, q: torch.Tensor, keys: Keys, out: torch.Tensor, metadata: Any) -> torch.Tensor:
        if keys.page_table is None:
            result = self.module.flash_attn_varlen_func(
                q, keys.k, keys.v, call.cu_seqlens_q, call.cu_seqlens_k, call.row.new_tokens, call.max_seqlen_k,
                causal=True, window_size=call.window,
            )  # fmt: skip
        else:
            result = self.module.flash_attn_with_kvcache(
                q, keys.k, keys.v, cache_seqlens=call.seqused_k, page_table=keys.page_table,
                cu_seqlens_q=call.cu_seqlens_q, max_seqlen_q=call.row.new_tokens, causal=True,
                window_size=call.window, scheduler_metadata=metadata,
            )  # fmt: skip
        return result[0] if isinstance(result, tuple) else result


_loaded: Dict[str, Any] = {}


def _load() -> Any:
    """The first source that works, once a process. Raises Skip with every reason."""
    if "backend" not in _loaded:
        _loaded["backend"] = _find()
    return _loaded["backend"]


def _find() -> Any:
    path = os.environ.get(LIBRARY)
    if path:
        if not os.path.isfile(path):
            raise Skip(f"{LIBRARY}: no file {path}")
        return _op_library(path)
    if find_spec("flash_attn_interface") is not None:
        try:
            return _Package(import_module("flash_attn_interface"))
        except Exception as error:  # a build for another torch fails in ways of its own
            raise Skip(f"flash_attn_interface: {type(error).__name__}: {error}") from None
    vllm = find_spec("vllm")
    for folder in (vllm.submodule_search_locations or []) if vllm else []:
        for found in glob.glob(os.path.join(folder, "vllm_flash_attn", "_vllm_fa3_C*.so")):
            return _op_library(found)
    raise Skip(f"FlashAttention 3 is not installed (flash_attn_interface, vllm, or {LIBRARY}=a _vllm_fa3_C*.so)")


def _op_library(path: str) -> _OpLibrary:
    try:
        return _OpLibrary(path)
    except OSError as error:
        raise Skip(f"{os.path.basename(path)} does not load: {str(error).splitlines()[0]}") from None
