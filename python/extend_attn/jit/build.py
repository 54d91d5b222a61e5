"""One build: its key, its ninja file, its run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from . import toolchain as tools
from .errors import BuildError
from .spec import HOST_FLAGS, LINK_FLAGS, MODULE, NVCC_FLAGS, Spec, source_hash

# Raised when what is written here changes the module and nothing else in the key tells.
FORMAT = 1
FILE = MODULE + EXTENSION_SUFFIXES[0]
# Variables that compilers read.
_COMPILER_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH")
# Of a failing build's output: its end, where the errors are.
_SHOWN_CHARACTERS = 20000

log = logging.getLogger("extend_attn.jit")


@dataclass(frozen=True)
class Build:
    """What is compiled (``spec``, ``csrc``) and with what. ``key`` names its folder in the cache."""

    spec: Spec
    toolchain: tools.Toolchain
    csrc: Path

    @property
    def source_hash(self) -> str:
        return source_hash(self.csrc)

    def key(self) -> str:
        """A hash over sources and headers, flags, compilers and the libraries that come with them, architectures,
        Python's ABI, pybind11, and the environment variables that compilers read."""
        host, nvcc = self.toolchain.host, self.toolchain.nvcc
        parts = {
            "format": FORMAT,
            "flags": [HOST_FLAGS, NVCC_FLAGS, LINK_FLAGS, self.spec.defines(self.source_hash)],
            "host": [host.path, host.version, host.machine, host.glibcxx],
            "nvcc": [nvcc.path, nvcc.version, nvcc.includes, nvcc.cudart],
            "sizes": [os.path.getsize(path) for path in (nvcc.cudart, *_runtime_headers(nvcc))],
            "python": [FILE, sys.version_info[:2], sys.implementation.name],
            "pybind11": tools.pybind11_facts()[0],
            "environment": {name: os.environ.get(name) for name in _COMPILER_VARIABLES},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def facts(self) -> Dict[str, Any]:
        """For build.json and ``jit info``."""
        return {
            "archs": self.spec.arch_text,
            "dtypes": self.spec.dtypes,
            "source_hash": self.source_hash,
            "python": FILE,
            **tools.facts(self.toolchain),
        }

    @staticmethod
    def object_name(source: Path) -> str:
        return f"{source.parent.name}_{source.name}.o"

    def ninja_file(self) -> str:
        """Commands with absolute sources and relative outputs: a build whose folder is gone cannot make it again."""
        host, nvcc = self.toolchain.host, self.toolchain.nvcc
        includes = [f"-I{self.csrc}"]
        system = [tools.pybind11_facts()[1], tools.python_include(), *nvcc.includes]
        defines = self.spec.defines(self.source_hash)
        gencode = [flag for arch in self.spec.archs for flag in arch.flags()]
        cxx = [host.path, *HOST_FLAGS, *defines, *includes, *(word for f in system for word in ("-isystem", f))]
        cuda = [nvcc.path, "-ccbin", host.path, *NVCC_FLAGS, *defines, *gencode, *includes]
        rules = {
            "host": [*cxx, "-c", "$in", "-o", "$out"],
            "cuda": [*cuda, "-c", "$in", "-o", "$out"],
            "link": [host.path, "$in", nvcc.cudart, *LINK_FLAGS, "-o", "$out"],
        }
        lines = ["ninja_required_version = 1.3"]
        for name, command in rules.items():
            lines += [f"rule {name}", f"  command = {_ninja_command(command)}"]
        objects = []
        for source in self.spec.sources(self.csrc):
            objects.append(self.object_name(source))
            rule = "cuda" if source.suffix == ".cu" else "host"
            lines.append(f"build {objects[-1]}: {rule} {_ninja_path(str(source))}")
        lines.append(f"build {FILE}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"

    def run(self, folder: Path) -> Dict[str, Any]:
        """Compiles into ``folder``; returns the facts for build.json. BuildError holds what the compilers said."""
        self.toolchain.nvcc.check_archs(self.spec.archs)
        (folder / "build.ninja").write_text(self.ninja_file(), encoding="utf-8")
        log.info("compiling csrc/ for %s, %s", self.spec.arch_text, self.spec.dtypes)
        started = time.monotonic()
        output = run_ninja(folder)
        seconds = time.monotonic() - started
        log.info("compiled in %.1f s", seconds)
        for leftover in folder.iterdir():
            if leftover.name != FILE:
                leftover.unlink()
        return {**self.facts(), "seconds": round(seconds, 2), "log": output, "made": time.strftime("%Y-%m-%d %H:%M:%S")}


def _runtime_headers(nvcc: tools.Nvcc) -> Tuple[str, ...]:
    """The headers that stand for the CUDA runtime's version: PyPI's packages are updated one by one."""
    paths = [os.path.join(folder, "cuda_runtime_api.h") for folder in nvcc.includes]
    return tuple(path for path in paths if os.path.exists(path))


def _ninja_command(words: List[str]) -> str:
    """A shell command in which ``$in`` and ``$out`` are ninja's."""
    return " ".join(word if word in ("$in", "$out") else shlex.quote(word).replace("$", "$$") for word in words)


def _ninja_path(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def run_ninja(folder: Path, targets: Sequence[str] = ()) -> str:
    """Builds ``targets`` (none: all) of ``folder/build.ninja``; returns what was printed, BuildError holds it.

    If this process is interrupted, ninja and the compilers below it end with it."""
    # As many jobs as cores: with ninja's two more, the bindings, which take longest, would get less than a core.
    command = [tools.find_ninja(), "-C", str(folder), f"-j{len(os.sched_getaffinity(0))}", *targets]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    try:
        output, _ = child.communicate()
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    if child.returncode:
        raise BuildError(
            f"compiling csrc/ failed (ninja ended with {child.returncode}):\n{output[-_SHOWN_CHARACTERS:]}"
        )
    return output
