"""What is built: the module's sources and how a selection of GPUs and types reaches the compiler.

The convention between csrc/ and this package:

- One pybind11 module, ``_comm`` (imported as ``extend_attn._comm``). Every ``csrc/bindings/*.cpp`` and
  ``csrc/comm/*.cpp`` is compiled by the host compiler, every ``csrc/kernels/*.cu`` and ``csrc/comm/*.cu`` by nvcc; each
  file is one object, all in parallel. The include folder is ``csrc/``.
- A ``.cu`` whose stem ends with ``_fp16``, ``_bf16`` or ``_fp32`` is compiled only if that type is asked for (which is
  how one build spreads over cores). Other files are always compiled.
- ``-DEXTEND_ATTN_DTYPE_BITS`` (bit 0 float16, 1 bfloat16, 2 float32) says which types those are. World sizes
  are run-time values.
- Two builds may be loaded into one process: a bound class is ``py::module_local()``, an exception is registered with
  ``py::register_local_exception``.
- C++17, no C++20 language or library: Debian 11 has gcc 10.2 and libstdc++ 3.4.28.
- ``build_info.h`` binds ``build_info()``; keep the call in ``bindings/module.cpp``.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator, Sequence, Tuple

MODULE = "_comm"
# Type -> how the stem of a .cu that serves it ends. The position is the bit of EXTEND_ATTN_DTYPE_BITS.
DTYPES = {"float16": "_fp16", "bfloat16": "_bf16", "float32": "_fp32"}
# What a build for everybody holds (and the compile-only test of CI): one of each generation that nvcc 13 and the
# kernels know.
ALL_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0")

STANDARD = "-std=c++17"
# Host code only prepares launches. -O1 compiles the bindings, the longest of all files, in 8.0 s; -O3 takes 13.1 s.
HOST_FLAGS = (STANDARD, "-O1", "-fPIC", "-fvisibility=hidden", "-Wall")
NVCC_FLAGS = (STANDARD, "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")
# The CUDA runtime is linked statically: the module then loads where there is no GPU, and beside any other CUDA version.
LINK_FLAGS = ("-shared", "-fPIC", "-Wl,--exclude-libs,ALL", "-lpthread", "-ldl", "-lrt")


@dataclass(frozen=True, order=True)
class Arch:
    """A GPU architecture: ``Arch.parse`` reads "9.0", "sm_90", "90", "10.0a", "12.0+PTX"."""

    major: int
    minor: int
    suffix: str = ""  # "a" or "f": code for this architecture (family) alone
    ptx: bool = False  # also PTX, which later GPUs compile when it is loaded

    @classmethod
    def parse(cls, text: str) -> Arch:
        """ValueError for what is not an architecture."""
        match = re.fullmatch(r"(?:sm_|compute_)?(\d+)\.?(\d)([af]?)(\+PTX)?", str(text).strip(), re.IGNORECASE)
        if not match:
            raise ValueError(f"archs: got {text!r}; expected a compute capability such as '9.0', 'sm_90' or '12.0+PTX'")
        return cls(int(match[1]), int(match[2]), match[3].lower(), bool(match[4]))

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{self.suffix}{'+PTX' if self.ptx else ''}"

    @property
    def number(self) -> str:
        """As nvcc spells it after sm_: "90", "100a"."""
        return f"{self.major}{self.minor}{self.suffix}"

    def flags(self) -> Tuple[str, ...]:
        """nvcc's options."""
        n = self.number
        codes = f"[sm_{n},compute_{n}]" if self.ptx else f"sm_{n}"
        return (f"-gencode=arch=compute_{n},code={codes}",)

    def serves(self, gpu: Arch) -> bool:
        """Whether code built for this runs on ``gpu``: the same generation and not newer, or PTX."""
        same = (self.major, self.minor) == (gpu.major, gpu.minor)
        if self.suffix or gpu.suffix:
            return same and self.suffix == gpu.suffix
        older = (self.major, self.minor) <= (gpu.major, gpu.minor)
        return older and (self.major == gpu.major or self.ptx)


@dataclass(frozen=True)
class Spec:
    """One build: architectures and types. ``Spec.of`` checks and orders what it is given."""

    archs: Tuple[Arch, ...]
    dtypes: Tuple[str, ...]

    @classmethod
    def of(cls, archs: Iterable[str], dtypes: Iterable[str]) -> Spec:
        """ValueError names the argument, what it got and what there is."""
        parsed = tuple(sorted({Arch.parse(arch) for arch in archs}))
        types = {str(t).replace("torch.", "") for t in dtypes}
        if not parsed:
            raise ValueError("archs: got none; expected compute capabilities such as '9.0'")
        if not types or types - set(DTYPES):
            raise ValueError(f"dtypes: got {sorted(types)}; allowed are {', '.join(DTYPES)}")
        return cls(parsed, tuple(t for t in DTYPES if t in types))

    @property
    def dtype_bits(self) -> int:
        return sum(1 << bit for bit, name in enumerate(DTYPES) if name in self.dtypes)

    @property
    def arch_text(self) -> str:
        """For build_info() and build.json. CMake splits at semicolons, nvcc at commas."""
        return "/".join(map(str, self.archs))

    def defines(self, source_hash: str) -> Tuple[str, ...]:
        """Options for both compilers."""
        return (
            f"-DEXTEND_ATTN_DTYPE_BITS={self.dtype_bits}",
            f'-DEXTEND_ATTN_ARCHS="{self.arch_text}"',
            f'-DEXTEND_ATTN_SOURCE_HASH="{source_hash}"',
        )

    def sources(self, csrc: Path) -> Tuple[Path, ...]:
        """The translation units: the host compiler's, the largest (the bindings: the slowest) first, then nvcc's."""
        left_out = tuple(suffix for name, suffix in DTYPES.items() if name not in self.dtypes)
        host = [p for folder in ("bindings", "comm") for p in (csrc / folder).glob("*.cpp")]
        host.sort(key=lambda path: (-path.stat().st_size, path))
        device = sorted(p for folder in ("kernels", "comm") for p in (csrc / folder).glob("*.cu"))
        return (*host, *(p for p in device if not p.stem.endswith(left_out or ("\0",))))


def csrc_folder() -> Path:
    """csrc/ of an installed package, or of the checkout that the package is in. FileNotFoundError if it is in
    neither."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "csrc", package.parent.parent / "csrc"):
        if (folder / "bindings" / "module.cpp").is_file():
            return folder
    raise FileNotFoundError(f"csrc/ is neither in {package} nor in {package.parent.parent}: reinstall extend-attn")


def _files(folder: str) -> Iterator[str]:
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.is_dir():
            yield from _files(entry.path)
        elif entry.name.endswith((".h", ".cuh", ".cpp", ".cu")):
            yield entry.path


def source_hash(csrc: Path) -> str:
    """Over names and contents of every source and header below ``csrc``."""
    digest = hashlib.sha256()
    for path in _files(str(csrc)):
        with open(path, "rb") as file:
            content = file.read()
        digest.update(f"{os.path.relpath(path, csrc)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:32]


def default_archs() -> Sequence[str]:
    """EXTEND_ATTN_ARCHS ("9.0;10.0", "all") split up; empty if it is not set."""
    text = os.environ.get("EXTEND_ATTN_ARCHS", "")
    return ALL_ARCHS if text.strip().lower() == "all" else [part for part in re.split(r"[;,\s]+", text) if part]
