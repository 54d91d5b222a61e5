"""Loading the C++/CUDA module: the installed one if it serves, else from the cache, else compiled now."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import Dict, Iterable, Optional, Tuple

from . import cache, devices
from .build import FILE, Build
from .errors import JitError
from .spec import DTYPES, MODULE, Arch, Spec, csrc_folder, default_archs, source_hash
from .toolchain import find_toolchain

NAME = f"extend_attn.{MODULE}"
_loaded: Dict[Tuple, ModuleType] = {}
_one_at_a_time = threading.Lock()


def load_comm_module(
    *,
    archs: Optional[Iterable[str]] = None,
    dtypes: Iterable[str] = tuple(DTYPES),
    nvcc: Optional[str] = None,
    cxx: Optional[str] = None,
) -> ModuleType:
    """The pybind11 module ``extend_attn._comm`` with kernels for what is asked for.

    ``archs``: compute capabilities such as ``("9.0",)``; None: EXTEND_ATTN_ARCHS, else those of the GPUs that this
    process sees. ``dtypes``: of "float16", "bfloat16", "float32". ``nvcc``, ``cxx``:
    programs, see toolchain.py. ValueError names a bad argument; JitError (ToolchainError, BuildError) says what was
    tried and what to install.
    """
    spec = make_spec(archs, dtypes)
    with _one_at_a_time:
        key = (spec, nvcc, cxx)
        if key not in _loaded:
            ahead = None if nvcc or cxx else installed()
            if ahead and serves(ahead.build_info(), spec, source_hash(csrc_folder())):
                _loaded[key] = ahead
            else:
                _loaded[key] = _load(build_module(spec, nvcc=nvcc, cxx=cxx))
        return _loaded[key]


def make_spec(archs: Optional[Iterable[str]], dtypes: Iterable[str]) -> Spec:
    """The arguments checked, with the architectures filled in."""
    return Spec.of(archs if archs is not None else default_archs() or devices.gpu_archs(), dtypes)


def build_module(spec: Spec, *, nvcc: Optional[str] = None, cxx: Optional[str] = None) -> Path:
    """The module's file: in the cache, put there now if it was not. Starts no process if it was."""
    build = Build(spec, find_toolchain(nvcc, cxx), csrc_folder())
    key = build.key()
    for root in cache.roots():
        found = cache.find(root / "modules" / key, FILE)
        if found:
            return found
    return cache.publish(cache.writable_root(), key, FILE, build.run)


def installed() -> Optional[ModuleType]:
    """The module that was compiled ahead (EXTEND_ATTN_AOT=1 pip install); None, with a warning if it is there and does
    not load."""
    if importlib.util.find_spec(NAME) is None:
        return None
    try:
        return importlib.import_module(NAME)
    except ImportError as error:
        warnings.warn(f"{NAME} is installed and cannot be loaded: {error}", RuntimeWarning, stacklevel=3)
        return None


def serves(info: Dict, spec: Spec, sources: str) -> bool:
    """Whether a module with this ``build_info()`` holds all of ``spec`` and was made from the sources of that hash."""
    built = [Arch.parse(arch) for arch in info["archs"].split("/")]
    return (
        info["source_hash"] == sources
        and spec.dtype_bits & ~info["dtype_bits"] == 0
        and all(any(b.serves(arch) for b in built) for arch in spec.archs)
    )


def _load(path: Path) -> ModuleType:
    """The extension module in ``path``, without an entry in sys.modules. A process may hold several builds: each has a
    name of its own, since pybind11 gives a module of the same name out a second time. (Python takes the last part of
    the name, ``_comm``, to find the function that makes the module.)"""
    name = f"extend_attn.jit.build_{path.parent.name}.{MODULE}"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, str(path), loader=loader)
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise JitError(
            f"{path} was compiled and cannot be loaded: {error}. If a library's version is the reason, the compiler is "
            "newer than the libstdc++ that this Python runs with: set CXX to the older compiler, or LD_LIBRARY_PATH to "
            "the newer library"
        ) from error
    return module
