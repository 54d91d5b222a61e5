"""From a call's arguments to checked ``Inputs`` and the ``Problem`` they pose.

Everything a host can check without reading device memory is checked here, once, before anything is launched: nothing
below re-checks. What only the device knows (the contents of index arrays) is checked on request, see checks.py. A
call like an earlier one skips these checks: a fact that a check looks at belongs into that test of likeness, calls.py.
"""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple, Optional, Sequence

import torch

from .problem import Problem

QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
INDEX_DTYPES = (torch.int32, torch.int64)
SINK_DTYPES = QUERY_DTYPES
ALIGNMENT = 16  # bytes: kernels are specialised for addresses and strides that are multiples of it
NUM_ROW_TENSORS = 6  # the first fields of Inputs: [rows, heads, dim]


class Inputs(NamedTuple):
    """One call's tensors and scalars, checked. Shapes as in ``extend_attention_fwd``; None where a feature is off.

    Two-stage, ``k_new``/``v_new`` hold the new tokens and ``kv_indptr``/``kv_indices`` the prefix. Unified,
    ``prefix_lens`` is given, ``k_new``/``v_new`` are None and the index arrays cover prefix and new tokens.
    """

    q: torch.Tensor
    k_new: Optional[torch.Tensor]
    v_new: Optional[torch.Tensor]
    o: torch.Tensor
    k_pool: Optional[torch.Tensor]
    v_pool: Optional[torch.Tensor]
    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    prefix_lens: Optional[torch.Tensor]
    custom_mask: Optional[torch.Tensor]
    mask_indptr: Optional[torch.Tensor]
    sinks: Optional[torch.Tensor]
    window_offsets: Optional[torch.Tensor]
    q_positions: Optional[torch.Tensor]
    lse: Optional[torch.Tensor]
    batch_size: int
    max_len_extend: int
    max_len_prefix: Optional[int]
    sm_scale: float
    k_scale: float
    v_scale: float
    logit_cap: float
    xai_temperature_len: int
    sliding_window: int
    is_causal: bool
    mask_prefix: bool

    @property
    def unified(self) -> bool:
        return self.prefix_lens is not None

    def problem(self) -> Problem:
        """The host facts of this call."""
        pool = self.k_pool if self.k_pool is not None else self.q
        return Problem(
            dtype=_name(self.q.dtype),
            head_dim_qk=self.q.shape[2],
            head_dim_v=self.o.shape[2],
            num_q_heads=self.q.shape[1],
            num_kv_heads=(self.k_pool if self.k_new is None else self.k_new).shape[1],  # type: ignore[union-attr]
            batch_size=self.batch_size,
            num_tokens=self.q.shape[0],
            max_len_extend=self.max_len_extend,
            num_kv_indices=self.kv_indices.numel(),
            kv_dtype=_name(pool.dtype),
            out_dtype=_name(self.o.dtype),
            index_dtype=_name(self.kv_indices.dtype),
            max_len_prefix=self.max_len_prefix,
            is_causal=self.is_causal,
            custom_mask=self.custom_mask is not None,
            mask_prefix=self.mask_prefix,
            sliding_window=self.sliding_window,
            window_offsets=self.window_offsets is not None,
            q_positions=self.q_positions is not None,
            sinks=self.sinks is not None,
            logit_cap=self.logit_cap,
            xai_temperature_len=self.xai_temperature_len,
            return_lse=self.lse is not None,
            unified=self.unified,
            v_aliases_k_pool=_aliases(self.k_pool, self.v_pool),
            v_aliases_k_new=_aliases(self.k_new, self.v_new),
            alignment=self._alignment(),
        )

    def _alignment(self) -> int:
        bits = 16
        for t in (self.q, self.k_new, self.v_new, self.o, self.k_pool, self.v_pool):
            if t is not None:
                bits |= t.data_ptr()
                if t.shape[0] > 1:
                    bits |= t.stride(0) * t.element_size()
                if t.shape[1] > 1:
                    bits |= t.stride(1) * t.element_size()
        return bits & -bits


def _name(dtype: torch.dtype) -> str:
    return str(dtype)[len("torch.") :]


def _aliases(k: Optional[torch.Tensor], v: Optional[torch.Tensor]) -> bool:
    """Does V lie in K's first columns, row for row (absorbed MLA)?"""
    return (
        k is not None
        and v is not None
        and k.dtype == v.dtype
        and k.numel() > 0
        and k.data_ptr() == v.data_ptr()
        and k.stride() == v.stride()
    )


def two_stage(
    q_extend, k_extend, v_extend, o_extend, k_buffer, v_buffer, qo_indptr, kv_indptr, kv_indices, custom_mask,
    is_causal, mask_indptr, max_len_extend, k_scale, v_scale, sm_scale, logit_cap, skip_prefix_custom_mask,
    sliding_window_size, sinks, window_kv_offsets, xai_temperature_len, *, return_lse, q_positions, max_len_prefix,
) -> Inputs:  # fmt: skip
    """Checks the arguments of ``extend_attention_fwd``. Raises TypeError or ValueError, naming the argument."""
    _rows("q_extend", q_extend, QUERY_DTYPES)
    device, dtype = q_extend.device, q_extend.dtype
    num_heads, head_dim = q_extend.shape[1], q_extend.shape[2]
    for name, t in (("k_extend", k_extend), ("v_extend", v_extend)):
        _rows(name, t)
        _same_dtype(name, t, "q_extend", dtype)
        _on(name, t, device)
    _kv_heads("k_extend", k_extend, num_heads)
    _dim("k_extend", k_extend, 2, head_dim, "the head dim of q_extend")
    _dim("v_extend", v_extend, 1, k_extend.shape[1], "the KV heads of k_extend")
    _output("o_extend", o_extend, q_extend, "q_extend", v_extend.shape[2], "v_extend")
    index = _indices(qo_indptr, kv_indptr, kv_indices, device)
    if kv_indices.numel() == 0:
        k_pool = v_pool = None
    else:
        k_pool, v_pool = _pool(k_buffer, v_buffer, dtype, device)
        _dim("k_buffer", k_pool, 1, k_extend.shape[1], "the KV heads of k_extend")
        _dim("k_buffer", k_pool, 2, head_dim, "the head dim of q_extend")
        _one_pool(k_pool, v_pool)
        _dim("v_buffer", v_pool, 2, v_extend.shape[2], "the head dim of v_extend")
    _bool("skip_prefix_custom_mask", skip_prefix_custom_mask)
    return Inputs(
        q=q_extend,
        k_new=k_extend,
        v_new=v_extend,
        o=o_extend,
        k_pool=k_pool,
        v_pool=v_pool,
        prefix_lens=None,
        mask_prefix=custom_mask is not None and not skip_prefix_custom_mask,
        **index,
        **_masks(custom_mask, mask_indptr, index["batch_size"], device),
        **_window("window_kv_offsets", window_kv_offsets, sliding_window_size, index["batch_size"], device),
        **_additions(sinks, q_positions, return_lse, q_extend),
        **_scalars(
            is_causal, max_len_extend, max_len_prefix, k_scale, v_scale, sm_scale, logit_cap, xai_temperature_len,
            head_dim,
        ),
    )  # fmt: skip


def unified(
    q, o, k_buffer, v_buffer, k_scale, v_scale, qo_indptr, kv_indptr, kv_indices, prefix_lens, max_len_extend,
    custom_mask, mask_indptr, sm_scale, logit_cap, is_causal, sliding_window_size, sinks, window_start_pos,
    xai_temperature_len, *, return_lse, q_positions, max_len_prefix,
) -> Inputs:  # fmt: skip
    """Checks the arguments of ``extend_attention_fwd_unified``."""
    _rows("q", q, QUERY_DTYPES)
    device = q.device
    k_pool, v_pool = _pool(k_buffer, v_buffer, q.dtype, device)
    _kv_heads("k_buffer", k_pool, q.shape[1], "q")
    _dim("k_buffer", k_pool, 2, q.shape[2], "the head dim of q")
    _one_pool(k_pool, v_pool)
    _output("o", o, q, "q", v_pool.shape[2], "v_buffer")
    index = _indices(qo_indptr, kv_indptr, kv_indices, device)
    _vector("prefix_lens", prefix_lens, INDEX_DTYPES, index["batch_size"], "one length a sequence", device)
    return Inputs(
        q=q,
        k_new=None,
        v_new=None,
        o=o,
        k_pool=k_pool,
        v_pool=v_pool,
        prefix_lens=prefix_lens,
        mask_prefix=custom_mask is not None,
        **index,
        **_masks(custom_mask, mask_indptr, index["batch_size"], device),
        **_window("window_start_pos", window_start_pos, sliding_window_size, index["batch_size"], device),
        **_additions(sinks, q_positions, return_lse, q),
        **_scalars(
            is_causal, max_len_extend, max_len_prefix, k_scale, v_scale, sm_scale, logit_cap, xai_temperature_len,
            q.shape[2],
        ),
    )  # fmt: skip


def empty_lse(q: torch.Tensor) -> torch.Tensor:
    """What rows outside ``qo_indptr`` keep: -inf."""
    return torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)


# ---- one check each; every message starts with the argument's name and ends with what is allowed ----


def _tensor(name: str, t: object) -> torch.Tensor:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    return t


def _on(name: str, t: torch.Tensor, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(f"{name}: is on {t.device} but the query is on {device}; move it with {name}.to('{device}')")


def _rows(name: str, t: object, dtypes: Optional[Sequence[torch.dtype]] = None) -> None:
    """A [rows, heads, head dim] tensor with contiguous rows."""
    t = _tensor(name, t)
    if t.dim() != 3:
        raise ValueError(f"{name}: expected 3 dimensions [rows, heads, head dim], got shape {tuple(t.shape)}")
    if dtypes is not None and t.dtype not in dtypes:
        raise TypeError(f"{name}: dtype is {t.dtype}; allowed are {_list(dtypes)}")
    if t.stride(2) != 1 and t.shape[2] > 1:
        raise ValueError(f"{name}: the last dim must be contiguous, its stride is {t.stride(2)}; use .contiguous()")
    if t.device.type not in ("cuda", "cpu"):
        raise ValueError(f"{name}: is on {t.device}; CUDA and CPU tensors are supported")


def _same_dtype(name: str, t: torch.Tensor, other: str, dtype: torch.dtype) -> None:
    if t.dtype != dtype:
        raise TypeError(f"{name}: dtype is {t.dtype} but {other} is {dtype}; cast it with {name}.to({dtype})")


def _dim(name: str, t: torch.Tensor, dim: int, size: int, what: str) -> None:
    if t.shape[dim] != size:
        raise ValueError(f"{name}: shape is {tuple(t.shape)}; dim {dim} must be {size}, {what}")


def _kv_heads(name: str, t: torch.Tensor, num_heads: int, query: str = "q_extend") -> None:
    if t.shape[1] == 0 or num_heads % t.shape[1]:
        raise ValueError(
            f"{name}: {t.shape[1]} KV heads do not divide the {num_heads} query heads of {query}; "
            "the query heads must be a multiple"
        )


def _output(name: str, o: object, q: torch.Tensor, query: str, head_dim_v: int, value: str) -> None:
    _rows(name, o)
    assert isinstance(o, torch.Tensor)
    if o.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"{name}: dtype is {o.dtype}; allowed are {_list((q.dtype, torch.float32))}")
    _on(name, o, q.device)
    _dim(name, o, 1, q.shape[1], f"the heads of {query}")
    _dim(name, o, 2, head_dim_v, f"the head dim of {value}")


def _pool(k_buffer: object, v_buffer: object, dtype: torch.dtype, device: torch.device):
    for name, t in (("k_buffer", k_buffer), ("v_buffer", v_buffer)):
        _rows(name, t, (dtype, *FP8_DTYPES))
        _on(name, t, device)  # type: ignore[arg-type]
    assert isinstance(k_buffer, torch.Tensor) and isinstance(v_buffer, torch.Tensor)
    return k_buffer, v_buffer


def _one_pool(k_buffer: torch.Tensor, v_buffer: torch.Tensor) -> None:
    """V is to K's liking; K itself has been looked at, so that what is wrong with K is not put down to V."""
    _same_dtype("v_buffer", v_buffer, "k_buffer", k_buffer.dtype)
    _dim("v_buffer", v_buffer, 1, k_buffer.shape[1], "the KV heads of k_buffer")
    _dim("v_buffer", v_buffer, 0, k_buffer.shape[0], "the slots of k_buffer")


def _vector(name: str, t: object, dtypes, length: int, why: str, device: torch.device) -> None:
    """A contiguous 1-D tensor of at least ``length`` elements; longer is fine (engines preallocate)."""
    t = _tensor(name, t)
    if t.dim() != 1:
        raise ValueError(f"{name}: expected 1 dimension, got shape {tuple(t.shape)}")
    if t.dtype not in dtypes:
        raise TypeError(f"{name}: dtype is {t.dtype}; allowed are {_list(dtypes)}")
    if t.numel() < length:
        raise ValueError(f"{name}: has {t.numel()} elements, needs at least {length} ({why})")
    if t.numel() > 1 and t.stride(0) != 1:
        raise ValueError(f"{name}: must be contiguous, its stride is {t.stride(0)}; use .contiguous()")
    _on(name, t, device)


def _indices(qo_indptr, kv_indptr, kv_indices, device: torch.device) -> dict:
    _vector("qo_indptr", qo_indptr, INDEX_DTYPES, 1, "the batch size + 1", device)
    batch_size = qo_indptr.numel() - 1
    _vector("kv_indptr", kv_indptr, INDEX_DTYPES, batch_size + 1, "the batch size of qo_indptr + 1", device)
    _vector("kv_indices", kv_indices, INDEX_DTYPES, 0, "", device)
    return dict(qo_indptr=qo_indptr, kv_indptr=kv_indptr, kv_indices=kv_indices, batch_size=batch_size)


def _masks(custom_mask, mask_indptr, batch_size: int, device: torch.device) -> dict:
    if custom_mask is None:
        return dict(custom_mask=None, mask_indptr=None)
    _vector("custom_mask", custom_mask, (torch.bool, torch.uint8), 0, "", device)
    if mask_indptr is None:
        raise ValueError("mask_indptr: is None but custom_mask is given; pass the start of each sequence's mask")
    _vector("mask_indptr", mask_indptr, (torch.int64,), batch_size + 1, "the batch size + 1", device)
    return dict(custom_mask=custom_mask, mask_indptr=mask_indptr)


def _window(name: str, offsets, sliding_window_size, batch_size: int, device: torch.device) -> dict:
    window = _int("sliding_window_size", sliding_window_size)
    if window <= 0:  # offsets are read only with a window
        return dict(sliding_window=-1, window_offsets=None)
    if window > 0x3FFFFFFF:
        raise ValueError(f"sliding_window_size: {window} is more than 2**30 - 1 tokens; pass -1 for no window")
    if offsets is not None:
        _vector(name, offsets, INDEX_DTYPES, batch_size, "one offset a sequence", device)
    return dict(sliding_window=window, window_offsets=offsets)


def _additions(sinks, q_positions, return_lse, q: torch.Tensor) -> dict:
    if sinks is not None:
        _vector("sinks", sinks, SINK_DTYPES, q.shape[1], "one sink a query head", q.device)
    if q_positions is not None:
        _vector("q_positions", q_positions, (torch.int32,), 0, "", q.device)
    lse = None
    if _bool("return_lse", return_lse):
        lse = empty_lse(q)
    return dict(sinks=sinks, q_positions=q_positions, lse=lse)


def _scalars(
    is_causal, max_len_extend, max_len_prefix, k_scale, v_scale, sm_scale, logit_cap, xai_temperature_len, head_dim
) -> dict:
    if _int("max_len_extend", max_len_extend) < 0:
        raise ValueError(f"max_len_extend: {max_len_extend} is negative; pass an upper bound of the new tokens")
    if max_len_prefix is not None and _int("max_len_prefix", max_len_prefix) < 0:
        raise ValueError(f"max_len_prefix: {max_len_prefix} is negative; pass an upper bound or None")
    k_scale = 1.0 if k_scale is None else _float("k_scale", k_scale)
    if k_scale < 0:
        raise ValueError(f"k_scale: {k_scale} is negative; a dequantisation scale is 0 or more")
    if _float("logit_cap", logit_cap) < 0:
        raise ValueError(f"logit_cap: {logit_cap} is negative; pass 0.0 for no cap")
    if _int("xai_temperature_len", xai_temperature_len) in (0, 1):
        raise ValueError(f"xai_temperature_len: {xai_temperature_len} has no logarithm to divide by; pass -1 for none")
    return dict(
        is_causal=_bool("is_causal", is_causal),
        max_len_extend=int(max_len_extend),
        max_len_prefix=max_len_prefix,
        k_scale=k_scale,
        v_scale=1.0 if v_scale is None else _float("v_scale", v_scale),
        sm_scale=head_dim**-0.5 if sm_scale is None else _float("sm_scale", sm_scale),
        logit_cap=float(logit_cap),
        xai_temperature_len=max(int(xai_temperature_len), -1),
    )


def _int(name: str, value: object) -> int:
    if isinstance(value, torch.Tensor) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an int on the host, got {type(value).__name__}")
    return value.__index__()  # type: ignore[attr-defined]


def _float(name: str, value: object) -> float:
    if isinstance(value, torch.Tensor) or not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a float on the host, got {type(value).__name__}; a tensor would need a sync")
    if not math.isfinite(value):
        raise ValueError(f"{name}: {value} is not finite")
    return float(value)


def _bool(name: str, value: object) -> bool:
    if not isinstance(value, (bool, int)):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return bool(value)


def _list(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d) for d in dict.fromkeys(dtypes))
