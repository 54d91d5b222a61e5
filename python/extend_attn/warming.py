"""Compiling and loading, before a serving path or a graph capture needs it."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Iterable, List, Optional, Set, Tuple, Union

import torch

from .attention import run_plan
from .devices import device_spec
from .inputs import Inputs
from .plan.device import DeviceSpec
from .plan.select import select
from .problem import FP8_TYPES, Problem

# Tokens a sequence of the stand-in calls: enough to run every loop, little enough to cost nothing.
_KEYS = 4


@dataclasses.dataclass(frozen=True)
class WarmupReport:
    """How many kernel variants were compiled or found loaded, and the seconds it took."""

    kernels: int
    seconds: float

    def __str__(self) -> str:
        return f"extend_attn: {self.kernels} kernel variants ready in {self.seconds:.1f} s"


def warmup(
    problems: Iterable[Problem], *, device: Union[torch.device, str, int, None] = None, plan: object = None
) -> WarmupReport:
    """Compiles and loads every kernel that calls like ``problems`` need; prints and returns how many there are.

    Runs each chosen plan once on small stand-in tensors of the problem's types, heads and strides (a few tokens; what
    kernels are specialised for does not include lengths), and synchronises. Plans that do not fit the device step down
    to the next legal tile here, so that a capture never has to.

    Args:
        problems: what will be called, e.g. from ``Problem.for_model``.
        device: a CUDA device; None is the current one.
        plan: as in ``extend_attention_fwd``, if the calls will pass it.

    Raises:
        RuntimeError: no CUDA device, or a graph is being captured.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("device: warmup needs a CUDA GPU; CPU tensors run on the reference and need none")
    from .kernels.launch import recipe_of  # needs Triton

    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("warmup: a CUDA graph is being captured; call it before the capture")
    index = device if isinstance(device, int) else torch.device("cuda" if device is None else device).index
    target = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    start = time.perf_counter()
    variants: Set[Tuple[str, str]] = set()
    done: Set[tuple] = set()
    for problem in problems:
        chosen = select(problem, device_spec(target), plan=plan)  # type: ignore[arg-type]
        if (problem.key(), chosen) in done:
            continue
        done.add((problem.key(), chosen))
        for inputs in stand_ins(problem, target):
            small = dataclasses.replace(problem, **_sizes(inputs))
            recipe = recipe_of(chosen, inputs, small)
            launched = run_plan(chosen, inputs, small, explicit=plan is not None, key=problem.key(), recipe=recipe)
            variants |= _variants(launched, inputs)
    torch.cuda.synchronize(target)
    report = WarmupReport(len(variants), time.perf_counter() - start)
    print(report, file=sys.stderr)
    return report


def variants_of(problem: Problem, device: DeviceSpec) -> Set[Tuple[str, str]]:
    """The kernel variants that a problem's plan on ``device`` needs, as ``warmup`` counts them; compiles nothing."""
    from .kernels.launch import kernels_of

    chosen = select(problem, device)
    found: Set[Tuple[str, str]] = set()
    for inputs in stand_ins(problem, torch.device("meta")):
        small = dataclasses.replace(problem, **_sizes(inputs))
        found |= _variants(kernels_of(chosen, inputs, small), inputs)
    return found


def _variants(launched: Iterable[tuple], inputs: Inputs) -> Set[Tuple[str, str]]:
    """(kernel's name, what it is specialised for) of each launch."""
    types = repr(_types(inputs))
    return {(kernel.__name__, repr(sorted(constants.items())) + types) for kernel, _, _, constants in launched}


def _sizes(inputs: Inputs) -> dict:
    return dict(
        batch_size=inputs.batch_size,
        num_tokens=inputs.q.shape[0],
        max_len_extend=inputs.max_len_extend,
        num_kv_indices=inputs.kv_indices.numel(),
        max_len_prefix=None,
    )


def _types(inputs: Inputs) -> List[Optional[str]]:
    return [str(value.dtype) if isinstance(value, torch.Tensor) else None for value in inputs]


def stand_ins(problem: Problem, device: torch.device) -> List[Inputs]:
    """Small inputs that select the same compiled kernels as the problem: one for each way pool values may be scaled."""
    p = problem
    batch = min(p.batch_size, 2)
    if batch == 0:
        return []
    new = min(p.max_len_extend, _KEYS)
    pool = p.unified or p.num_kv_indices > 0
    keys = _KEYS if pool else 0

    def rows(count: int, heads: int, dim: int, dtype: str) -> torch.Tensor:
        return torch.zeros(count, heads, dim, dtype=getattr(torch, dtype), device=device)

    def ints(values: List[int], dtype: str = "int32") -> torch.Tensor:
        return torch.tensor(values, dtype=getattr(torch, dtype), device=device)

    def value(k: Optional[torch.Tensor], aliases: bool, dtype: str) -> Optional[torch.Tensor]:
        if k is None:
            return None
        return k[..., : p.head_dim_v] if aliases else rows(k.shape[0], p.num_kv_heads, p.head_dim_v, dtype)

    tokens = batch * new
    listed = keys + (new if p.unified else 0)
    k_new = None if p.unified else rows(tokens, p.num_kv_heads, p.head_dim_qk, p.dtype)
    k_pool = rows(16, p.num_kv_heads, p.head_dim_qk, p.kv_dtype) if pool else None
    one = Inputs(
        q=rows(tokens, p.num_q_heads, p.head_dim_qk, p.dtype),
        k_new=k_new,
        v_new=value(k_new, p.v_aliases_k_new, p.dtype),
        o=rows(tokens, p.num_q_heads, p.head_dim_v, p.out_dtype),
        k_pool=k_pool,
        v_pool=value(k_pool, p.v_aliases_k_pool, p.kv_dtype),
        qo_indptr=ints([new * b for b in range(batch + 1)]),
        kv_indptr=ints([listed * b for b in range(batch + 1)]),
        kv_indices=ints([0] * (batch * listed), p.index_dtype),
        prefix_lens=ints([keys] * batch) if p.unified else None,
        custom_mask=torch.ones(tokens * (keys + new), dtype=torch.uint8, device=device) if p.custom_mask else None,
        mask_indptr=ints([new * (keys + new) * b for b in range(batch + 1)], "int64") if p.custom_mask else None,
        sinks=torch.zeros(p.num_q_heads, device=device) if p.sinks else None,
        window_offsets=ints([0] * batch) if p.window_offsets else None,
        q_positions=ints([0] * tokens) if p.q_positions else None,
        lse=torch.zeros(tokens, p.num_q_heads, device=device) if p.return_lse else None,
        batch_size=batch,
        max_len_extend=new,
        max_len_prefix=None,
        sm_scale=1.0,
        k_scale=1.0,
        v_scale=1.0,
        logit_cap=p.logit_cap,
        xai_temperature_len=p.xai_temperature_len,
        sliding_window=p.sliding_window,
        is_causal=p.is_causal,
        mask_prefix=p.mask_prefix,
    )
    scaled = [one._replace(v_scale=0.5)] if p.kv_dtype in FP8_TYPES else []
    return [one, *scaled]
