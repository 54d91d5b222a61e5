"""Compiling csrc/ on the user's machine: ``load_comm_module``. Imports no torch.

A call is: which build is needed (``spec``, ``devices``), with which compilers (``toolchain``), is it there already
(``cache``), else make it (``build``), load it (``modules``).
"""

from .errors import BuildError, JitError, ToolchainError
from .modules import load_comm_module

__all__ = ["BuildError", "JitError", "ToolchainError", "load_comm_module"]
