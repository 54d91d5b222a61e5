"""How each Triton version launches a compiled kernel, here and only here: its C launcher without the dispatch above.

A launcher takes grid, stream and function, then a few options and hooks, then the kernel's arguments, whose pointers
may be plain addresses. What stands in the middle changes from version to version; ``_MIDDLE`` holds it for the versions
that were read. Every other version, launcher (AMD's) or kernel (one that needs scratch memory) has no handle, and its
calls keep to Triton's own dispatch.

Of a kernel that takes TMA descriptors, Triton wraps the C launcher in a function that takes each apart into an encoded
map, sizes and strides, anew in each launch. The handle has the launcher beneath and what takes one apart, so that the
pieces can be kept.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any, Callable, Dict, NamedTuple, Optional, Sequence, Tuple

import triton

from .compat import TRITON_VERSION

# Attributes of the launcher, the kernel's metadata, and None for what a call without hooks and scratch memory leaves
# out (launch metadata, hook before, hook after; global scratch from 3.3 on, scratch of profilers from 3.5 on).
_METADATA = "packed_metadata"
_GRID, _PDL = "launch_cooperative_grid", "launch_pdl"
_3_5 = (_GRID, _PDL, None, None, _METADATA, None, None, None)
_3_7 = (_GRID, _PDL, _METADATA, None, None, None, None, None, "arg_annotations", "kernel_signature")
_MIDDLE: Dict[Tuple[int, int], Tuple[Optional[str], ...]] = {
    (3, 2): (_METADATA, None, None, None),
    (3, 3): (_GRID, None, _METADATA, None, None, None),
    (3, 4): (_GRID, _PDL, None, _METADATA, None, None, None),
    (3, 5): _3_5,
    (3, 6): _3_5,
    (3, 7): _3_7,
    (3, 8): _3_7,
    (3, 9): _3_7,
}
_ONE_TUPLE = (3, 7)  # from here on the kernel's arguments are one tuple
_WITH_CONSTANTS = (3, 3)  # from here on compile-time arguments are among them


class Handle(NamedTuple):
    """A compiled and loaded kernel: ``launch(x, y, z, stream, *head, *arguments)``, the arguments as one tuple if
    ``one_tuple``. ``apart(i, descriptor)``: the arguments that stand for its i-th descriptor, None where no kernel's
    can be had. ``kernel`` keeps the module loaded."""

    launch: Callable[..., None]
    head: tuple
    one_tuple: bool
    with_constants: bool
    kernel: Any
    apart: Optional[Callable[[int, Any], Sequence[Any]]] = None


def handle_of(kernel: Any, version: Tuple[int, int] = TRITON_VERSION) -> Optional[Handle]:
    """The handle of what ``function.run`` returned after a launch; None if this version or kernel has none."""
    middle = _MIDDLE.get(version)
    if middle is None:
        return None
    try:
        launcher, function = kernel.run, kernel.function
        scratch = getattr(launcher, "global_scratch_size", 0) or getattr(launcher, "profile_scratch_size", 0)
        sanitized = getattr(launcher, "gsan_enabled", False)  # adds arguments of its own
        if type(launcher).__name__ != "CudaLauncher" or function is None or scratch or sanitized:
            return None
        head = [kernel.packed_metadata if name == _METADATA else name and getattr(launcher, name) for name in middle]
        launch, apart = launcher.launch, None
        if isinstance(launch, FunctionType) and _BENEATH in launch.__code__.co_freevars:
            launch, apart = _beneath(launch, kernel)
        one_tuple, with_constants = version >= _ONE_TUPLE, version >= _WITH_CONSTANTS
        return Handle(launch, (function, *head), one_tuple, with_constants, kernel, apart)
    except (AttributeError, ImportError):  # a build that is not what its version says
        return None


_BENEATH = "launcher"  # what the wrapper calls the C launcher


def _beneath(wrapper: FunctionType, kernel: Any) -> Tuple[Callable[..., None], Callable[[int, Any], Sequence[Any]]]:
    """The launcher under a wrapper, and what the wrapper does to a descriptor."""
    from triton.backends.nvidia import driver

    take_apart = driver.make_tensordesc_arg
    several = take_apart.__code__.co_argcount > 2  # from 3.9 on it is also shown the launch, for its errors
    facts = getattr(kernel.metadata, "tensordesc_meta", None)

    def apart(i: int, descriptor: Any) -> Sequence[Any]:
        return take_apart(descriptor, facts[i] if facts else None, *((None,) if several else ()))

    cells = dict(zip(wrapper.__code__.co_freevars, wrapper.__closure__ or ()))
    return cells[_BENEATH].cell_contents, apart


def hooked() -> bool:
    """Whether someone (a profiler) wants to see launches; they see those of Triton's own dispatch."""
    enter, leave = _HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook
    # None or a function; from 3.5 on a chain of functions, which may be empty
    return bool((enter and getattr(enter, "calls", True)) or (leave and getattr(leave, "calls", True)))


# where hooks are set: in the knobs from 3.4 on
_HOOKS: Any = triton.knobs.runtime if hasattr(triton, "knobs") else triton.compiler.CompiledKernel
