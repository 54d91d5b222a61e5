"""Extend attention in plain PyTorch: the definition the kernels are held to, and what CPU tensors run on.

Read ``attend`` first: it is attention of one sequence with every feature of the library, in a dozen lines. ``visible``
says which key each query may see. ``run`` walks a batch: it gathers each sequence's keys from the pool and calls the
two. Lengths are read on the host, so none of this can be captured in a CUDA graph; it is exact and slow on purpose.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Iterator, NamedTuple, Optional, Tuple

import torch

from . import inputs as checked
from .inputs import Inputs

# Elements of the largest temporary (logits of one query chunk): 64 Mi, that is 256 MiB in fp32.
LOGITS_PER_CHUNK = 1 << 26


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    *,
    sm_scale: float,
    logit_cap: float = 0.0,
    temperature: Optional[torch.Tensor] = None,
    sinks: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence, computed in the type of ``q``.

    q ``[M, Hq, Dq]``, k ``[N, Hkv, Dq]``, v ``[N, Hkv, Dv]``, visible ``[M, N]`` bool (query m sees key n), temperature
    ``[M]`` (factor of a query's logits), sinks ``[Hq]`` (a logit without a value, added to the denominator).
    Returns the output ``[M, Hq, Dv]`` and the natural log of the denominator ``[M, Hq]``. A query that sees nothing and
    has no sink gets 0 and -inf.
    """
    num_queries, num_q_heads, _ = q.shape
    num_kv_heads = k.shape[1]
    # 0 * NaN is NaN: a value that nobody sees must not meet the zero weights.
    v = v.masked_fill(~visible.any(dim=0)[:, None, None], 0.0)

    grouped = q.reshape(num_queries, num_kv_heads, num_q_heads // num_kv_heads, q.shape[2])
    logits = torch.einsum("mhgd,nhd->hgmn", grouped, k).flatten(0, 1) * sm_scale  # [Hq, M, N]
    if logit_cap > 0:
        logits = logit_cap * torch.tanh(logits / logit_cap)
    if temperature is not None:
        logits = logits * temperature[:, None]
    logits = logits.masked_fill(~visible, -math.inf)

    sink = q.new_full((num_q_heads,), -math.inf) if sinks is None else sinks.to(q.dtype)
    sink = sink[:, None].expand(num_q_heads, num_queries)  # [Hq, M]
    largest = torch.maximum(logits.amax(dim=-1), sink) if logits.shape[-1] else sink
    largest = largest.masked_fill(largest == -math.inf, 0.0)  # nothing seen: exp(-inf - 0) = 0
    weights = torch.exp(logits - largest[..., None])
    denominator = weights.sum(dim=-1) + torch.exp(sink - largest)
    lse = largest + torch.log(denominator)
    weights = weights / denominator.masked_fill(denominator == 0, 1.0)[..., None]

    weights = weights.view(num_kv_heads, num_q_heads // num_kv_heads, num_queries, k.shape[0])
    out = torch.einsum("hgmn,nhd->mhgd", weights, v).reshape(num_queries, num_q_heads, v.shape[2])
    return out, lse.transpose(0, 1)


class Positions(NamedTuple):
    """Absolute positions (tokens) of one sequence's queries ``[M]`` and keys ``[N]``; keys are prefix, then extend."""

    query: torch.Tensor
    key: torch.Tensor


def visible(
    rows: torch.Tensor,
    prefix_len: int,
    extend_len: int,
    positions: Positions,
    *,
    is_causal: bool,
    window: int = -1,
    mask: Optional[torch.Tensor] = None,
    mask_prefix: bool = False,
) -> torch.Tensor:
    """Which key each query sees, bool ``[len(rows), prefix_len + extend_len]``.

    rows: the extend row of each query. mask: bool ``[len(rows), prefix_len + extend_len]`` or None; it decides alone
    over the extend keys, and over the prefix if ``mask_prefix``. window: a query sees keys up to ``window`` positions
    back (and itself: window + 1 keys); <= 0 is none.
    """
    seen = torch.ones(rows.numel(), prefix_len + extend_len, dtype=torch.bool, device=rows.device)
    if mask is not None:
        first = 0 if mask_prefix else prefix_len
        seen[:, first:] = mask[:, first:]
    elif is_causal:
        seen[:, prefix_len:] = torch.arange(extend_len, device=rows.device) <= rows[:, None]
    if window > 0:
        seen &= positions.query[:, None] <= positions.key + window
    return seen


def temperature(position: torch.Tensor, length: int, dtype: torch.dtype) -> Optional[torch.Tensor]:
    """Grok models: a factor ``log2(position) / log2(length)`` past ``length`` tokens, 1 before; None if off."""
    if length <= 0:
        return None
    factor = torch.log2(position.clamp(min=1).to(dtype)) / math.log2(length)
    return torch.where(position > length, factor, torch.ones_like(factor))


class _Sequence(NamedTuple):
    """One sequence of a batch: its queries, keys and values in the compute type, and its place in the arrays."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    first_row: int
    prefix_len: int
    positions: Positions  # of all its extend rows and all its keys
    mask: Optional[torch.Tensor]  # [E, P + E]


def _gather(pool: torch.Tensor, slots: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """The pool's rows at ``slots``, dequantised: ``scale * pool[slots]``."""
    if pool.element_size() == 1:  # indexing fp8 is not implemented everywhere; its bytes can always be indexed
        rows = pool.view(torch.uint8)[slots].view(pool.dtype)
    else:
        rows = pool[slots]
    return rows.to(dtype) * scale


def _sequences(inputs: Inputs, dtype: torch.dtype) -> Iterator[_Sequence]:
    """The sequences of a batch that have a query."""
    batch = inputs.batch_size
    qo_indptr = inputs.qo_indptr[: batch + 1].tolist()
    kv_indptr = inputs.kv_indptr[: batch + 1].tolist()
    offsets = [0] * batch if inputs.window_offsets is None else inputs.window_offsets[:batch].tolist()
    for b in range(batch):
        begin, end = qo_indptr[b], qo_indptr[b + 1]
        extend_len, slots_from = end - begin, kv_indptr[b]
        if extend_len <= 0:
            continue
        if inputs.unified:
            prefix_len = int(inputs.prefix_lens[b])
            num_slots = prefix_len + extend_len
        else:
            prefix_len = num_slots = kv_indptr[b + 1] - slots_from
        slots = inputs.kv_indices[slots_from : slots_from + num_slots].long()
        keys = [_gather(inputs.k_pool, slots, inputs.k_scale, dtype)] if num_slots else []
        values = [_gather(inputs.v_pool, slots, inputs.v_scale, dtype)] if num_slots else []
        if not inputs.unified:
            keys.append(inputs.k_new[begin:end].to(dtype))
            values.append(inputs.v_new[begin:end].to(dtype))
        yield _Sequence(
            q=inputs.q[begin:end].to(dtype),
            k=torch.cat(keys),
            v=torch.cat(values),
            first_row=begin,
            prefix_len=prefix_len,
            positions=_positions(inputs, begin, end, prefix_len, offsets[b]),
            mask=_mask(inputs, b, extend_len, prefix_len, offsets[b]),
        )


def _positions(inputs: Inputs, begin: int, end: int, prefix_len: int, cut: int) -> Positions:
    """Prefix key j stands at ``cut + j`` and extend row m at ``cut + P + m``, unless ``q_positions`` says otherwise."""
    device = inputs.q.device
    prefix = cut + torch.arange(prefix_len, device=device)
    if inputs.q_positions is None:
        extend = cut + prefix_len + torch.arange(end - begin, device=device)
    else:
        extend = inputs.q_positions[begin:end].long()
    return Positions(query=extend, key=torch.cat([prefix, extend]))


def _mask(inputs: Inputs, b: int, extend_len: int, prefix_len: int, cut: int) -> Optional[torch.Tensor]:
    """Sequence b's custom mask ``[E, P + E]``. Two-stage rows begin with ``cut`` columns for keys that are gone."""
    if inputs.custom_mask is None:
        return None
    skipped = 0 if inputs.unified else cut
    stride = skipped + prefix_len + extend_len
    start = int(inputs.mask_indptr[b])
    flat = inputs.custom_mask[start : start + extend_len * stride]
    return flat.view(extend_len, stride)[:, skipped:].ne(0)


def run(inputs: Inputs, compute_dtype: torch.dtype = torch.float32) -> None:
    """Write the attention of a validated batch to ``inputs.o`` (and ``inputs.lse``, if it is there).

    Rows outside ``qo_indptr`` are left alone. Computes in ``compute_dtype`` (fp32 or fp64; fp32 with IEEE products) and
    rounds once, to the type of ``o``. Queries go in chunks, so that an 8k x 8k prefill fits anywhere.
    """
    with torch.no_grad(), _ieee_products():
        for sequence in _sequences(inputs, compute_dtype):
            _run_sequence(inputs, sequence)


def _run_sequence(inputs: Inputs, sequence: _Sequence) -> None:
    extend_len, num_heads, _ = sequence.q.shape
    num_keys = sequence.k.shape[0]
    chunk = max(1, LOGITS_PER_CHUNK // (num_heads * num_keys))
    for start in range(0, extend_len, chunk):
        rows = torch.arange(start, min(start + chunk, extend_len), device=sequence.q.device)
        positions = Positions(sequence.positions.query[rows], sequence.positions.key)
        seen = visible(
            rows,
            sequence.prefix_len,
            extend_len,
            positions,
            is_causal=inputs.is_causal,
            window=inputs.sliding_window,
            mask=None if sequence.mask is None else sequence.mask[rows],
            mask_prefix=inputs.mask_prefix or inputs.unified,
        )
        out, lse = attend(
            sequence.q[rows],
            sequence.k,
            sequence.v,
            seen,
            sm_scale=inputs.sm_scale,
            logit_cap=inputs.logit_cap,
            temperature=temperature(positions.query, inputs.xai_temperature_len, sequence.q.dtype),
            sinks=inputs.sinks,
        )
        place = slice(sequence.first_row + start, sequence.first_row + start + rows.numel())
        inputs.o[place] = out.to(inputs.o.dtype)
        if inputs.lse is not None:
            inputs.lse[place] = lse.to(inputs.lse.dtype)


@contextmanager
def _ieee_products() -> Iterator[None]:
    """Turn TF32 off while the reference computes: it would be no better than the kernels it judges."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch 2.9 and later refuse to read it where the caller uses the newer setting instead
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def extend_attention_fwd(
    q_extend, k_extend, v_extend, o_extend, k_buffer, v_buffer, qo_indptr, kv_indptr, kv_indices, custom_mask,
    is_causal, mask_indptr, max_len_extend, k_scale, v_scale, sm_scale=None, logit_cap=0.0,
    skip_prefix_custom_mask=True, sliding_window_size=-1, sinks=None, window_kv_offsets=None, xai_temperature_len=-1,
    *, return_lse: bool = False, q_positions=None, compute_dtype: torch.dtype = torch.float32,
) -> Optional[torch.Tensor]:  # fmt: skip
    """``extend_attn.extend_attention_fwd`` by the reference: same arguments, checks and results, on any device."""
    inputs = checked.two_stage(
        q_extend, k_extend, v_extend, o_extend, k_buffer, v_buffer, qo_indptr, kv_indptr, kv_indices, custom_mask,
        is_causal, mask_indptr, max_len_extend, k_scale, v_scale, sm_scale, logit_cap, skip_prefix_custom_mask,
        sliding_window_size, sinks, window_kv_offsets, xai_temperature_len,
        return_lse=return_lse, q_positions=q_positions, max_len_prefix=None,
    )  # fmt: skip
    run(inputs, compute_dtype)
    return inputs.lse


def extend_attention_fwd_unified(
    q, o, k_buffer, v_buffer, k_scale, v_scale, qo_indptr, kv_indptr, kv_indices, prefix_lens, max_len_extend,
    custom_mask=None, mask_indptr=None, sm_scale=None, logit_cap=0.0, is_causal=True, sliding_window_size=-1,
    sinks=None, window_start_pos=None, xai_temperature_len=-1,
    *, return_lse: bool = False, q_positions=None, compute_dtype: torch.dtype = torch.float32,
) -> Optional[torch.Tensor]:  # fmt: skip
    """``extend_attn.extend_attention_fwd_unified`` by the reference: same arguments, checks and results."""
    inputs = checked.unified(
        q, o, k_buffer, v_buffer, k_scale, v_scale, qo_indptr, kv_indptr, kv_indices, prefix_lens, max_len_extend,
        custom_mask, mask_indptr, sm_scale, logit_cap, is_causal, sliding_window_size, sinks, window_start_pos,
        xai_temperature_len, return_lse=return_lse, q_positions=q_positions, max_len_prefix=None,
    )  # fmt: skip
    run(inputs, compute_dtype)
    return inputs.lse
