"""The public operations: validate, plan, launch.

    extend_attention_fwd(tensors)
      inputs.two_stage()   the arguments, checked once -> Inputs, Problem (host facts only)
      plan.select()        Problem -> Plan: which kernel and tile, how many splits, and why
      kernels.launch()     Plan + Inputs -> the Triton kernels, no decisions

A call like an earlier one finds the results of the first two, and what the third makes of them, in calls.py.

CPU tensors run on the plain PyTorch reference, or, with TRITON_INTERPRET=1, on the kernels in Triton's interpreter.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from typing import Any, Dict, List, Optional, Tuple

import torch

from . import calls, reference
from . import inputs as _inputs
from .checks import last_error, verify
from .devices import device_spec
from .inputs import Inputs
from .plan.candidates import step_down
from .plan.device import DeviceSpec
from .plan.select import PlanLike, TileLike, select
from .plan.tile import Plan
from .problem import Problem

__all__ = [
    "build_unified_kv_indices",
    "extend_attention_fwd",
    "extend_attention_fwd_unified",
    "last_error",
    "prepare",
    "redundant_attention",
]

# Tiles that did not fit after all, by (problem key, device): what was found to fit instead.
_stepped_down: Dict[Tuple[Any, DeviceSpec], Plan] = {}


def extend_attention_fwd(
    q_extend: torch.Tensor,
    k_extend: torch.Tensor,
    v_extend: torch.Tensor,
    o_extend: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    custom_mask: Optional[torch.Tensor],
    is_causal: bool,
    mask_indptr: Optional[torch.Tensor],
    max_len_extend: int,
    k_scale: Optional[float],
    v_scale: Optional[float],
    sm_scale: Optional[float] = None,
    logit_cap: float = 0.0,
    skip_prefix_custom_mask: bool = True,
    sliding_window_size: int = -1,
    sinks: Optional[torch.Tensor] = None,
    window_kv_offsets: Optional[torch.Tensor] = None,
    xai_temperature_len: int = -1,
    *,
    return_lse: bool = False,
    q_positions: Optional[torch.Tensor] = None,
    plan: PlanLike = None,
    tile: TileLike = None,
    max_len_prefix: Optional[int] = None,
    check: bool = False,
    batch_invariant: bool = False,
) -> Optional[torch.Tensor]:
    """New tokens attend to their sequence's prefix in a KV pool of page size 1 and to each other; writes ``o_extend``.

    The positional arguments are those of SGLang's function of this name, in its order. T new tokens in the batch,
    B sequences with prefix length P_b and E_b new tokens, Hq query and Hkv KV heads (Hq % Hkv == 0), S pool slots.
    Index arrays, masks and row tensors may be longer than what is used; what lies beyond is neither read nor written.

    Args:
        q_extend: ``[T, Hq, Dq]``, bf16, fp16 or fp32; like every row tensor with a contiguous last dim.
        k_extend, v_extend: ``[T, Hkv, Dq]``, ``[T, Hkv, Dv]``, the query's type: the new tokens' keys and values.
        o_extend: ``[T, Hq, Dv]``, the query's type or fp32; rows outside ``qo_indptr`` are not touched.
        k_buffer, v_buffer: ``[S, Hkv, Dq]``, ``[S, Hkv, Dv]``, the query's type, float8_e4m3fn or float8_e5m2.
            ``v_buffer`` may alias ``k_buffer``. Not looked at if ``kv_indices`` is empty.
        qo_indptr: ``[B + 1]`` int32/int64; rows ``qo_indptr[b]:qo_indptr[b + 1]`` belong to sequence b.
        kv_indptr, kv_indices: ``[>= B + 1]``, ``[>= sum P_b]`` int32/int64; slots of b's prefix in position order.
        custom_mask, mask_indptr: flat bool/uint8 and ``[>= B + 1]`` int64, or None. Row m of b starts at
            ``mask_indptr[b] + m * (P_b + E_b + w_b)``; its first w_b columns are skipped. It alone decides which new
            tokens a new token sees; on the prefix it counts if ``skip_prefix_custom_mask`` is False.
        is_causal: without a mask, new token m sees new tokens 0..m, else all of its sequence.
        max_len_extend: upper bound of E_b in tokens, on the host; a larger value costs time, never correctness.
        k_scale, v_scale: dequantisation factors of the pool (None is 1.0); they do not apply to new tokens.
        sm_scale: factor of ``q . k``; None is ``Dq ** -0.5`` and 0.0 is 0.0.
        logit_cap: c > 0 makes a logit s ``c * tanh(s / c)``.
        sliding_window_size: W > 0 hides keys with ``position(q) > position(k) + W`` (W + 1 keys remain).
        sinks: ``[Hq]`` fp32/bf16/fp16, a logit a head that joins the denominator without a value.
        window_kv_offsets: ``[>= B]`` int32/int64, w_b: keys before the given prefix that the engine has cut off; read
            only with a window. Prefix key j has position w_b + j, new token m w_b + P_b + m.
        xai_temperature_len: X > 1 multiplies logits by ``log2(position) / log2(X)`` where position > X.
        return_lse: return the fp32 ``[T, Hq]`` natural log of the denominator over keys and sink (-inf where a row
            saw nothing and outside ``qo_indptr``).
        q_positions: ``[T]`` int32, absolute positions of the new tokens for the window and temperature rules (nodes
            of a draft tree at one depth share one); causality goes by row.
        plan, tile: override the selection: a Plan, a dict of its fields, ``"sglang"``, ``"sglang-legacy"``,
            ``"heuristic"`` or ``"table:PATH"``; ``tile=`` is short for ``plan={"tile": ...}``.
        max_len_prefix: upper bound of P_b in tokens, on the host; only refines the plan.
        check: verify the contents of every index array on the device first. Eager it synchronises and raises
            ValueError with the first bad element; under capture ``last_error()`` reads the verdict later.
        batch_invariant: not available yet.

    Returns:
        The LSE if asked for, else None. A row that sees no key and has no sink is 0 (LSE -inf).

    Raises:
        ValueError, TypeError, NotImplementedError: naming the argument, before anything is launched or written.
        KernelNotLoaded: a kernel is missing and a CUDA graph is being captured; see ``warmup``.
    """
    _refuse(batch_invariant)
    likeness, call = calls.repeated(
        False,
        (
            q_extend, k_extend, v_extend, o_extend, k_buffer, v_buffer, qo_indptr, kv_indptr, kv_indices, None,
            custom_mask, mask_indptr, sinks, window_kv_offsets, q_positions,
        ),
        max_len_extend,
        max_len_prefix,
        (
            is_causal, k_scale, v_scale, sm_scale, logit_cap, skip_prefix_custom_mask, sliding_window_size,
            xai_temperature_len, return_lse,
        ),
        plan, tile, check,
    )  # fmt: skip
    if call is None:
        checked = _inputs.two_stage(
            q_extend, k_extend, v_extend, o_extend, k_buffer, v_buffer, qo_indptr, kv_indptr, kv_indices, custom_mask,
            is_causal, mask_indptr, max_len_extend, k_scale, v_scale, sm_scale, logit_cap, skip_prefix_custom_mask,
            sliding_window_size, sinks, window_kv_offsets, xai_temperature_len,
            return_lse=return_lse, q_positions=q_positions, max_len_prefix=max_len_prefix,
        )  # fmt: skip
        call = calls.first(likeness, checked)
    return _run(call, plan, tile, check)


def extend_attention_fwd_unified(
    q: torch.Tensor,
    o: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    k_scale: Optional[float],
    v_scale: Optional[float],
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    prefix_lens: torch.Tensor,
    max_len_extend: int,
    custom_mask: Optional[torch.Tensor] = None,
    mask_indptr: Optional[torch.Tensor] = None,
    sm_scale: Optional[float] = None,
    logit_cap: float = 0.0,
    is_causal: bool = True,
    sliding_window_size: int = -1,
    sinks: Optional[torch.Tensor] = None,
    window_start_pos: Optional[torch.Tensor] = None,
    xai_temperature_len: int = -1,
    *,
    return_lse: bool = False,
    q_positions: Optional[torch.Tensor] = None,
    plan: PlanLike = None,
    tile: TileLike = None,
    max_len_prefix: Optional[int] = None,
    check: bool = False,
    batch_invariant: bool = False,
) -> Optional[torch.Tensor]:
    """``extend_attention_fwd`` with the new tokens' keys and values in the pool too; writes ``o``.

    The positional arguments are those of SGLang's function of this name. One index array holds prefix then new
    tokens; the others are as in ``extend_attention_fwd``, except:

    Args:
        kv_indptr, kv_indices: ``[>= B + 1]``, ``[>= sum (P_b + E_b)]``, see ``build_unified_kv_indices``.
        prefix_lens: ``[>= B]`` int32/int64, P_b: where sequence b's list turns from prefix to new tokens.
        k_scale, v_scale: apply to every key, the new tokens' included.
        custom_mask: covers prefix and new tokens, row stride ``P_b + E_b``.
        window_start_pos: ``[>= B]`` int32/int64, position of the first key of the list (None is 0), read only with a
            window.
    """
    _refuse(batch_invariant)
    likeness, call = calls.repeated(
        True,
        (
            q, None, None, o, k_buffer, v_buffer, qo_indptr, kv_indptr, kv_indices, prefix_lens, custom_mask,
            mask_indptr, sinks, window_start_pos, q_positions,
        ),
        max_len_extend,
        max_len_prefix,
        (is_causal, k_scale, v_scale, sm_scale, logit_cap, sliding_window_size, xai_temperature_len, return_lse),
        plan, tile, check,
    )  # fmt: skip
    if call is None:
        checked = _inputs.unified(
            q, o, k_buffer, v_buffer, k_scale, v_scale, qo_indptr, kv_indptr, kv_indices, prefix_lens, max_len_extend,
            custom_mask, mask_indptr, sm_scale, logit_cap, is_causal, sliding_window_size, sinks, window_start_pos,
            xai_temperature_len, return_lse=return_lse, q_positions=q_positions, max_len_prefix=max_len_prefix,
        )  # fmt: skip
        call = calls.first(likeness, checked)
    return _run(call, plan, tile, check)


def prepare(*args: Any, **kwargs: Any) -> Tuple[Inputs, Problem, Plan]:
    """(Inputs, Problem, Plan) of an ``extend_attention_fwd`` call with these arguments; launches nothing."""
    bound = inspect.signature(extend_attention_fwd).bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    plan, tile = call.pop("plan"), call.pop("tile")
    call.pop("check"), _refuse(call.pop("batch_invariant"))
    checked = _inputs.two_stage(**call)
    problem = checked.problem()
    return checked, problem, _plan(problem, checked.q.device, plan, tile)


def _refuse(batch_invariant: bool) -> None:
    if batch_invariant:
        raise NotImplementedError("batch_invariant: not available in this version; pass False")


def _run(call: calls.Call, plan: PlanLike, tile: TileLike, check: bool) -> Optional[torch.Tensor]:
    """Plan and launch a checked call."""
    prepared, checked, addresses, lse = call
    if checked is None:
        prepared.bound.launch(addresses)
        return lse
    problem = prepared.problem
    if check:
        checked = verify(checked)
    device = checked.q.device
    explicit = plan is not None or tile is not None
    if device.type == "cpu" and not _interpret():
        if explicit:  # refuse what the kernels would refuse
            _plan(problem, device, plan, tile)
        reference.run(checked)
        return checked.lse
    launching = _launching()
    if prepared.recipe is None:
        prepared.plan = _plan(problem, device, plan, tile)
        prepared.recipe = launching.recipe_of(prepared.plan, checked, problem)
    assert prepared.plan is not None
    if prepared.bound is None and addresses is not None:  # the kernels may have run already, for other lengths
        prepared.bound = not launching.is_empty(problem) and launching.bind(prepared.recipe, checked)
    if prepared.bound and not check and prepared.bound.ready():  # verify may have replaced a tensor
        prepared.bound.launch(addresses)
    else:
        run_plan(prepared.plan, checked, problem, explicit=explicit, recipe=prepared.recipe)
    return checked.lse


def run_plan(
    plan: Plan, checked: Inputs, problem: Problem, *, explicit: bool, key: Any = None, recipe: Any = None
) -> List[tuple]:
    """Launches ``plan``; one that the library chose steps down to the next legal tile if the device refuses it.

    A step down is remembered for ``key``, the ``Problem.key()`` that the plan was chosen for (None: this problem's).
    ``recipe`` is the plan's, if it is there already.
    """
    launching = _launching()
    while True:
        try:
            return launching.launch(plan, checked, problem, recipe)
        except launching.OutOfResources as error:
            device = device_spec(checked.q.device)
            smaller = None if explicit else step_down(problem, plan, device)
            if smaller is None or torch.cuda.is_current_stream_capturing():
                raise
            warnings.warn(f"{plan} does not fit {device.name} ({error}); using {smaller}", stacklevel=4)
            plan = _stepped_down[problem.key() if key is None else key, device] = smaller
            recipe = None
            calls.forget()  # calls that remember the larger plan


@functools.cache
def _launching() -> Any:
    """kernels/launch.py, which needs Triton; CPU tensors do not."""
    from .kernels import launch

    return launch


def _plan(problem: Problem, device: torch.device, plan: PlanLike, tile: TileLike) -> Plan:
    spec = device_spec(device)
    if plan is None and tile is None and _stepped_down:
        smaller = _stepped_down.get((problem.key(), spec))
        if smaller is not None:
            return smaller
    return select(problem, spec, plan=plan, tile=tile)


def _interpret() -> bool:
    """Do CPU tensors run on the kernels, in Triton's interpreter?"""
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        return False
    from .kernels.compat import INTERPRETED

    if not INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET: was set after the kernels were imported; set it before the first call")
    return True


def build_unified_kv_indices(
    prefix_kv_indptr: torch.Tensor,
    prefix_kv_indices: torch.Tensor,
    extend_start_loc: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    extend_kv_indices: torch.Tensor,
    bs: int,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merges prefix and new-token slots into the one index array that the unified function reads.

    Args:
        prefix_kv_indptr, prefix_kv_indices: ``[>= bs + 1]``, ``[>= sum P_b]``: the prefix slots of each sequence.
        extend_start_loc, extend_seq_lens: ``[>= bs]``: where b's new tokens start in ``extend_kv_indices``, and E_b.
        extend_kv_indices: ``[>= sum E_b]``: the new tokens' slots.
        bs: the batch size.

    Returns:
        ``(unified_kv_indptr [bs + 1], unified_kv_indices int64, prefix_lens [bs])``. The indices are as long as both
        inputs together; what lies past ``unified_kv_indptr[bs]`` is 0. No synchronisation with the device.
    """
    prefix_lens = prefix_kv_indptr[1 : bs + 1] - prefix_kv_indptr[:bs]
    indptr = torch.zeros(bs + 1, dtype=torch.int64, device=prefix_kv_indptr.device)
    torch.cumsum(prefix_lens + extend_seq_lens[:bs], dim=0, out=indptr[1:])
    total = prefix_kv_indices.numel() + extend_kv_indices.numel()
    merged = torch.zeros(total, dtype=torch.int64, device=prefix_kv_indptr.device)
    if bs == 0 or total == 0:
        return indptr, merged, prefix_lens
    at = torch.arange(total, device=merged.device)
    b = torch.searchsorted(indptr, at, right=True) - 1
    used = b < bs
    b = b.clamp(max=bs - 1)
    local = at - indptr[b]
    for slots, start, new in (
        (prefix_kv_indices, prefix_kv_indptr[b] + local, False),
        (extend_kv_indices, extend_start_loc[b] + local - prefix_lens[b], True),
    ):
        if slots.numel():
            values = slots[start.clamp(0, slots.numel() - 1)].to(torch.int64)
            merged = torch.where(used & ((local >= prefix_lens[b]) == new), values, merged)
    return indptr, merged, prefix_lens


def redundant_attention(
    q_extend: torch.Tensor,
    o_extend: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    b_req_idx: torch.Tensor,
    b_start_loc: torch.Tensor,
    b_seq_len: torch.Tensor,
    b_seq_len_prefix: torch.Tensor,
    max_len_in_batch: int,
) -> None:
    """Causal attention of whole sequences that keeps the new tokens' rows only: a slow check of the others.

    Args:
        q_extend, o_extend: ``[sum E_b, Hq, D]``; E_b is ``b_seq_len - b_seq_len_prefix``.
        k_buffer, v_buffer: ``[S, Hkv, D]``, the sequences contiguous at ``b_start_loc``, of the query's type.
        b_req_idx: ``[B]``, only its length is used.
        b_start_loc, b_seq_len, b_seq_len_prefix: ``[B]`` ints.
        max_len_in_batch: upper bound of ``b_seq_len``.

    Synchronises with the device.
    """
    device = q_extend.device
    starts, lens, prefixes = (t.tolist() for t in (b_start_loc, b_seq_len, b_seq_len_prefix))
    row = 0
    for start, length, prefix in zip(starts, lens, prefixes):
        q = torch.zeros(length, *q_extend.shape[1:], dtype=q_extend.dtype, device=device)
        q[prefix:] = q_extend[row : row + length - prefix]
        o = torch.empty(length, *o_extend.shape[1:], dtype=o_extend.dtype, device=device)
        whole = torch.tensor([0, length], dtype=torch.int32, device=device)
        none = torch.zeros(2, dtype=torch.int32, device=device)
        extend_attention_fwd(
            q, k_buffer[start : start + length], v_buffer[start : start + length], o, k_buffer, v_buffer, whole, none,
            none[:0], None, True, None, max_len_in_batch, None, None,
        )  # fmt: skip
        o_extend[row : row + length - prefix] = o[prefix:]
        row += length - prefix
