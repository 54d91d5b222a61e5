"""What can go wrong while a module is built or loaded."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


class JitError(RuntimeError):
    """No module: the message says what was tried and what to install or set."""


class ToolchainError(JitError):
    """A tool that the build needs is missing or does not work."""


class BuildError(JitError):
    """A compiler or the linker failed; the message holds the command and its output."""


def require(name: str) -> ModuleType:
    """A package of the extra ``[jit]``, imported when it is needed: looking a module up in the cache needs only some of
    them."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ToolchainError(f"the Python package {error.name!r} is missing: pip install 'extend-attn[jit]'") from None
