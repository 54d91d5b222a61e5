"""What a plan launches, but for its tensors: kernels, grids, numbers, compile-time constants.

Every family has a builder ``recipe_of(plan, inputs, problem) -> Recipe`` in a module of its own; launch.py finds it by
the plan's family. A builder is the one place that knows the order of its kernels' arguments.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch

from ..inputs import Inputs
from ..problem import Problem
from .workspace import Workspace

LOG2E = math.log2(math.e)
NUM_TENSORS = Inputs._fields.index("batch_size")


class Kernel(NamedTuple):
    """One launch but for its tensors, which come before ``numbers``. ``constants`` are the compile-time arguments and
    options by name; a launch passes the former by position (``values``), which is cheaper to bind."""

    function: Any
    grid: Tuple[int]
    numbers: tuple
    constants: Dict[str, Any]
    values: tuple
    options: Dict[str, Any]


class Recipe(NamedTuple):
    """All that a plan launches but the tensors: the same for all calls of one problem with these scalars and strides.

    ``tensors(inputs, *workspaces)`` gives each kernel's leading arguments for one call, in the order of ``kernels``. A
    parameter that is a tensor of Inputs bears its name there, so that a launch can be repeated from addresses
    (bound.py); memory beside those is in ``workspaces``.
    """

    kernels: Tuple[Kernel, ...]
    tensors: Callable[..., Tuple[List[object], ...]]
    workspaces: Tuple[Workspace, ...] = ()


def kernel(function: Any, programs: int, numbers: tuple, constants: Dict[str, Any], **options: Any) -> Kernel:
    """``constants`` are the kernel's compile-time parameters, which come last, in their order."""
    assert function.arg_names[-len(constants) :] == list(constants), function.arg_names
    return Kernel(function, (programs,), numbers, {**constants, **options}, tuple(constants.values()), options)


def strides(t: Optional[torch.Tensor]) -> Tuple[int, int]:
    """Row and head stride; 0 for a tensor that is not there."""
    return t.stride()[:2] if t is not None else (0, 0)


def scalars(i: Inputs) -> tuple:
    """The numbers of a call that every family passes, in one order: window, the scale of new and of pool keys (base 2,
    without sign), the pool's value scale, cap, temperature length and its log2."""
    length = i.xai_temperature_len
    return (
        i.sliding_window,
        abs(i.sm_scale) * LOG2E, abs(i.sm_scale) * i.k_scale * LOG2E, i.v_scale, i.logit_cap,
        length, math.log2(length) if length > 1 else 1.0,
    )  # fmt: skip


def numbers(i: Inputs, splits: int, row_blocks: int) -> tuple:
    """What the plain extend kernel and the packed Hopper kernel take after their tensors."""
    return (
        *strides(i.q), *strides(i.k_new), *strides(i.v_new), *strides(i.o), *strides(i.k_pool), *strides(i.v_pool),
        i.batch_size, *scalars(i), splits, row_blocks,
    )  # fmt: skip


def features(inputs: Inputs, problem: Problem) -> Dict[str, Any]:
    """The compile-time features of a call, so that one that is off costs nothing."""
    return dict(
        HAS_POOL=inputs.k_pool is not None,
        UNIFIED=problem.unified,
        CAUSAL=problem.is_causal,
        WINDOW=problem.sliding_window > 0,
        MASK=problem.custom_mask,
        MASK_PREFIX=problem.mask_prefix,
        SINKS=problem.sinks,
        CAP=problem.logit_cap > 0,
        TEMPERATURE=problem.xai_temperature_len > 1,
        Q_POSITIONS=problem.q_positions,
        LSE=problem.return_lse,
        V_SCALED=inputs.v_scale != 1.0 and inputs.k_pool is not None,
    )
