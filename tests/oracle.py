"""What extend attention is, in fp64, by its definition: an oracle that shares nothing with the library.

A batch is cut into sequences; for each, a boolean matrix says which key a query row sees, and a dense softmax over
exactly those keys gives the output and the log of the denominator. Everything is slow and obvious on purpose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import List, Optional

import torch

# Query rows times keys that one step may hold: 32 Mi fp64 logits are 256 MiB.
STEP = 1 << 25


@dataclass
class Result:
    """out ``[T, Hq, Dv]`` and lse ``[T, Hq]``; used ``[T]``: does a sequence own the row (if not: NaN and -inf)."""

    out: torch.Tensor
    lse: torch.Tensor
    used: torch.Tensor


@dataclass
class _Logits:
    """The rules that turn a dot product into a logit."""

    scale: float
    cap: float
    temperature_len: int
    sinks: Optional[torch.Tensor]


def sees(
    prefix: int,
    extend: int,
    query_position: torch.Tensor,
    key_position: torch.Tensor,
    *,
    causal: bool,
    window: int,
    mask: Optional[torch.Tensor],
    mask_covers_prefix: bool,
) -> torch.Tensor:
    """Bool ``[extend, prefix + extend]``: does row m see key n (prefix keys first)."""
    row = torch.arange(extend, device=query_position.device)[:, None]
    key = torch.arange(prefix + extend, device=query_position.device)[None, :]
    in_prefix = (key < prefix).expand(extend, -1)
    if mask is None:
        prefix_rule = torch.ones_like(in_prefix)
        extend_rule = (key - prefix <= row) if causal else torch.ones_like(in_prefix)
    else:
        prefix_rule = mask if mask_covers_prefix else torch.ones_like(in_prefix)
        extend_rule = mask
    seen = torch.where(in_prefix, prefix_rule, extend_rule)
    if window > 0:
        seen = seen & (query_position[:, None] <= key_position[None, :] + window)
    return seen


def attend(q, k, v, seen, query_position, rules: _Logits):
    """One sequence: q ``[E, Hq, Dq]``, k ``[N, Hkv, Dq]``, v ``[N, Hkv, Dv]``, seen ``[E, N]`` -> out, lse."""
    extend, heads, _ = q.shape
    group = heads // k.shape[1]
    out = q.new_zeros(extend, heads, v.shape[2])
    lse = q.new_full((extend, heads), -math.inf)
    wanted = seen.any(dim=0)  # keys that nobody sees are dropped before any arithmetic: they may hold NaN
    k, v, seen = k[wanted], v[wanted], seen[:, wanted]
    step = max(1, STEP // max(1, k.shape[0]))
    for head in range(heads):
        keys, values = k[:, head // group], v[:, head // group]
        sink = None if rules.sinks is None else rules.sinks[head].to(q.dtype)
        for rows in torch.arange(extend, device=q.device).split(step):
            logit = q[rows, head] @ keys.T * rules.scale
            if rules.cap > 0:
                logit = rules.cap * torch.tanh(logit / rules.cap)
            if rules.temperature_len > 1:
                position = query_position[rows].to(q.dtype)
                factor = torch.log2(position.clamp(min=1)) / math.log2(rules.temperature_len)
                factor = torch.where(position > rules.temperature_len, factor, torch.ones_like(factor))
                logit = logit * factor[:, None]
            logit = logit.masked_fill(~seen[rows], -math.inf)
            terms = logit if sink is None else torch.cat([logit, sink.expand(len(rows), 1)], dim=1)
            if terms.shape[1] == 0:
                continue
            log_denominator = torch.logsumexp(terms, dim=1)
            weight = torch.exp(logit - log_denominator[:, None])
            weight = weight.masked_fill(~seen[rows], 0.0)
            out[rows, head] = weight @ values
            lse[rows, head] = log_denominator
    return out, lse


def _result(q_extend, dim_v: int, dtype: torch.dtype) -> Result:
    tokens, heads, _ = q_extend.shape
    return Result(
        out=torch.full((tokens, heads, dim_v), math.nan, dtype=dtype, device=q_extend.device),
        lse=torch.full((tokens, heads), -math.inf, dtype=dtype, device=q_extend.device),
        used=torch.zeros(tokens, dtype=torch.bool, device=q_extend.device),
    )


def _rows(pool: torch.Tensor, slots: torch.Tensor, scale: Optional[float], dtype: torch.dtype) -> torch.Tensor:
    if pool.element_size() == 1:
        rows = pool.view(torch.uint8)[slots].view(pool.dtype)
    else:
        rows = pool[slots]
    return rows.to(dtype) * (1.0 if scale is None else scale)


def _offsets(offsets: Optional[torch.Tensor], batch: int, window: int) -> List[int]:
    """``w_b``: read only where there is a window."""
    return [0] * batch if offsets is None or window <= 0 else offsets[:batch].tolist()


def _query_positions(q_positions, begin: int, end: int, first: int, device) -> torch.Tensor:
    if q_positions is not None:
        return q_positions[begin:end].long()
    return first + torch.arange(end - begin, device=device)


def extend(
    q_extend,
    k_extend,
    v_extend,
    k_buffer,
    v_buffer,
    qo_indptr,
    kv_indptr,
    kv_indices,
    custom_mask,
    is_causal,
    mask_indptr,
    max_len_extend=None,
    k_scale=1.0,
    v_scale=1.0,
    sm_scale=None,
    logit_cap=0.0,
    skip_prefix_custom_mask=True,
    sliding_window_size=-1,
    sinks=None,
    window_kv_offsets=None,
    xai_temperature_len=-1,
    q_positions=None,
    dtype=torch.float64,
) -> Result:
    """Two-stage: the prefix is in the pool, the new tokens in ``k_extend`` and ``v_extend``."""
    result = _result(q_extend, v_extend.shape[2], dtype)
    starts, slots_at = qo_indptr.tolist(), kv_indptr.tolist()
    cut = _offsets(window_kv_offsets, len(starts) - 1, sliding_window_size)
    scale = q_extend.shape[2] ** -0.5 if sm_scale is None else sm_scale
    rules = _Logits(scale, logit_cap, xai_temperature_len, sinks)
    for b in range(len(starts) - 1):
        begin, end = starts[b], starts[b + 1]
        new, prefix = end - begin, slots_at[b + 1] - slots_at[b]
        if new == 0:
            continue
        k, v = k_extend[begin:end].to(dtype), v_extend[begin:end].to(dtype)
        if prefix:
            slots = kv_indices[slots_at[b] : slots_at[b + 1]].long()
            k = torch.cat([_rows(k_buffer, slots, k_scale, dtype), k])
            v = torch.cat([_rows(v_buffer, slots, v_scale, dtype), v])
        mask = None
        if custom_mask is not None:
            width, at = cut[b] + prefix + new, int(mask_indptr[b])
            mask = custom_mask[at : at + new * width].view(new, width)[:, cut[b] :] != 0
        position = _query_positions(q_positions, begin, end, cut[b] + prefix, q_extend.device)
        prefix_position = cut[b] + torch.arange(prefix, device=q_extend.device)
        seen = sees(
            prefix,
            new,
            position,
            torch.cat([prefix_position, position]),
            causal=is_causal,
            window=sliding_window_size,
            mask=mask,
            mask_covers_prefix=not skip_prefix_custom_mask,
        )
        result.out[begin:end], result.lse[begin:end] = attend(
            q_extend[begin:end].to(dtype), k, v, seen, position, rules
        )
        result.used[begin:end] = True
    return result


def unified(
    q,
    k_buffer,
    v_buffer,
    k_scale,
    v_scale,
    qo_indptr,
    kv_indptr,
    kv_indices,
    prefix_lens,
    max_len_extend=None,
    custom_mask=None,
    mask_indptr=None,
    sm_scale=None,
    logit_cap=0.0,
    is_causal=True,
    sliding_window_size=-1,
    sinks=None,
    window_start_pos=None,
    xai_temperature_len=-1,
    q_positions=None,
    dtype=torch.float64,
) -> Result:
    """Unified: prefix and new tokens are all in the pool, one index list a sequence."""
    result = _result(q, v_buffer.shape[2], dtype)
    starts, slots_at = qo_indptr.tolist(), kv_indptr.tolist()
    cut = _offsets(window_start_pos, len(starts) - 1, sliding_window_size)
    scale = q.shape[2] ** -0.5 if sm_scale is None else sm_scale
    rules = _Logits(scale, logit_cap, xai_temperature_len, sinks)
    for b in range(len(starts) - 1):
        begin, end, prefix = starts[b], starts[b + 1], int(prefix_lens[b])
        new = end - begin
        if new == 0:
            continue
        slots = kv_indices[slots_at[b] : slots_at[b] + prefix + new].long()
        mask = None
        if custom_mask is not None:
            width, at = prefix + new, int(mask_indptr[b])
            mask = custom_mask[at : at + new * width].view(new, width) != 0
        position = _query_positions(q_positions, begin, end, cut[b] + prefix, q.device)
        prefix_position = cut[b] + torch.arange(prefix, device=q.device)
        seen = sees(
            prefix,
            new,
            position,
            torch.cat([prefix_position, position]),
            causal=is_causal,
            window=sliding_window_size,
            mask=mask,
            mask_covers_prefix=True,
        )
        k, v = _rows(k_buffer, slots, k_scale, dtype), _rows(v_buffer, slots, v_scale, dtype)
        result.out[begin:end], result.lse[begin:end] = attend(q[begin:end].to(dtype), k, v, seen, position, rules)
        result.used[begin:end] = True
    return result
