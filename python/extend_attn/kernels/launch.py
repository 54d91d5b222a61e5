"""Launches a plan over checked inputs. No decisions: what to run is in the plan, what on is in the inputs."""

from __future__ import annotations

import functools
from typing import Callable, List, Optional

import torch

from ..inputs import Inputs
from ..plan.tile import Plan
from ..problem import Problem
from . import launch_plain
from .bound import bind, remember
from .compat import INTERPRETED, OutOfResources
from .recipe import Recipe
from .workspace import workspaces

__all__ = ["KernelNotLoaded", "OutOfResources", "Recipe", "bind", "is_empty", "kernels_of", "launch", "recipe_of"]


class KernelNotLoaded(RuntimeError):
    """A kernel would have to be compiled or loaded while a CUDA graph is being captured."""


def is_empty(problem: Problem) -> bool:
    """Whether there are no new tokens, so that nothing is launched: tensors without rows have no TMA descriptors."""
    return problem.batch_size == 0 or problem.max_len_extend == 0 or problem.num_tokens == 0


def launch(plan: Plan, inputs: Inputs, problem: Problem, recipe: Optional[Recipe] = None) -> List[tuple]:
    """Enqueues the kernels of ``plan`` on the current stream of the inputs' device.

    Returns what was launched: (kernel, grid, arguments, constants) each. ``recipe`` is that of the plan and inputs, if
    it is there already; its kernels are kept for ``bind``.

    Raises ``OutOfResources`` (nothing enqueued) if the tile does not fit the device, ``KernelNotLoaded``
    (nothing enqueued) if the stream is capturing and a kernel is not loaded yet.
    """
    if is_empty(problem):
        return []
    device = inputs.q.device
    if device.type == "cpu":
        return _launch_interpreted(plan, inputs, problem, recipe)
    if device.index == torch.cuda.current_device():
        return _launch(plan, inputs, problem, recipe)
    with torch.cuda.device(device):
        return _launch(plan, inputs, problem, recipe)


def _launch(plan: Plan, inputs: Inputs, problem: Problem, recipe: Optional[Recipe]) -> List[tuple]:
    repeats = recipe is not None
    recipe = recipe_of(plan, inputs, problem) if recipe is None else recipe
    kernels = kernels_of(plan, inputs, problem, recipe)
    if not INTERPRETED and torch.cuda.is_current_stream_capturing():
        _require_loaded(kernels)
    for kernel, (_, _, arguments, _) in zip(recipe.kernels, kernels):
        # what kernel[grid](...) does
        compiled = kernel.function.run(*arguments, *kernel.values, grid=kernel.grid, warmup=False, **kernel.options)
        if repeats:
            remember(kernel, arguments, compiled, inputs.q.device)
    return kernels


def kernels_of(plan: Plan, inputs: Inputs, problem: Problem, recipe: Optional[Recipe] = None) -> List[tuple]:
    """(kernel, grid, arguments, constants) of each launch that ``plan`` takes, in order."""
    recipe = recipe_of(plan, inputs, problem) if recipe is None else recipe
    own = workspaces(recipe.workspaces, inputs.q.device)
    return [
        (kernel.function, kernel.grid, [*tensors, *kernel.numbers], kernel.constants)
        for kernel, tensors in zip(recipe.kernels, recipe.tensors(inputs, *own))
    ]


def recipe_of(plan: Plan, inputs: Inputs, problem: Problem) -> Recipe:
    """What ``plan`` launches for calls like this one."""
    return _builder(plan.family)(plan, inputs, problem)


@functools.cache
def _builder(family: str) -> Callable[[Plan, Inputs, Problem], Recipe]:
    """The recipe builder of a family; Gluon is imported where a plan asks for it, since older Tritons have none."""
    if family == "hopper_packed":
        from .hopper import launch_packed

        return launch_packed.recipe_of
    if family == "hopper_tiled":
        from .hopper import launch_tiled

        return launch_tiled.recipe_of
    return launch_plain.recipe_of


def _require_loaded(kernels: list) -> None:
    """Under capture nothing may be loaded: a compile would stall it and a module load can break it."""
    for kernel, grid, arguments, constants in kernels:
        compiled = kernel.warmup(*arguments, grid=grid, **constants)
        if compiled.module is None:
            raise KernelNotLoaded(
                f"{kernel.__name__}: not loaded, and a CUDA graph is being captured; run extend_attn.warmup(problems) "
                "or one eager call of this shape before the capture"
            )


def _launch_interpreted(plan: Plan, inputs: Inputs, problem: Problem, recipe: Optional[Recipe]) -> List[tuple]:
    """TRITON_INTERPRET=1 on CPU tensors. The interpreter multiplies the raw bits of bf16 and truncates its stores,
    so bf16 is widened to fp32 first and the output rounded by PyTorch."""
    if inputs.q.dtype != torch.bfloat16:
        return _launch(plan, inputs, problem, recipe)
    widened = {
        name: t.float()
        for name in ("q", "k_new", "v_new", "o", "k_pool", "v_pool")
        for t in (getattr(inputs, name),)
        if t is not None and t.dtype == torch.bfloat16
    }
    wide = inputs._replace(**widened)
    kernels = _launch(plan, wide, wide.problem(), None)
    inputs.o.copy_(wide.o)
    return kernels
