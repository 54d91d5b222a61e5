"""The compilers: where they are looked for, in which order, and what is asked of them.

nvcc: the argument; CUDA_HOME; CUDA_PATH; PATH; the PyPI packages (``nvidia-cuda-nvcc`` and friends, the extra
``[cuda]``). Host compiler: the argument; CXX; ``g++`` on PATH. It is passed on to nvcc with -ccbin, so that both halves
of a module are compiled by one compiler.

The first that exists is taken. If it does not work, that is an error and not a reason to take the next: a build with
another compiler than the one that was named would be a surprise. What a compiler answered is remembered
(cache.remembered).
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Optional, Tuple

from . import cache
from .errors import ToolchainError, require
from .spec import STANDARD, Arch

PROBE_SECONDS = 120
INSTALL_NVCC = "install the CUDA toolkit and set CUDA_HOME to it, or pip install 'extend-attn[cuda]'"
INSTALL_HOST = "install g++ 9 or later (Debian, Ubuntu: apt-get install g++), or set CXX to one"


@dataclass(frozen=True)
class HostCompiler:
    """``found`` says where it was looked for; ``glibcxx`` is the newest symbol version of its libstdc++ ("3.4.28"),
    which a module built by it may need."""

    path: str
    found: str
    version: str
    machine: str
    glibcxx: str


@dataclass(frozen=True)
class Nvcc:
    """``includes`` and ``cudart`` (the static CUDA runtime) belong to the toolkit that ``path`` is of; ``archs`` is
    what it can generate code for ("75", "90a")."""

    path: str
    found: str
    version: str
    includes: Tuple[str, ...]
    cudart: str
    archs: Tuple[str, ...]

    def check_archs(self, archs: Tuple[Arch, ...]) -> None:
        """ToolchainError for an architecture that this nvcc does not know."""
        plain = {re.sub(r"[af]$", "", arch) for arch in self.archs}
        wrong = [arch for arch in archs if arch.number not in self.archs and f"{arch.major}{arch.minor}" not in plain]
        if wrong:
            raise ToolchainError(
                f"archs: {self.path} is version {self.version} and generates no code for {', '.join(map(str, wrong))}; "
                f"it knows sm_{', sm_'.join(self.archs)}. Use another toolkit: {INSTALL_NVCC}"
            )


@dataclass(frozen=True)
class Toolchain:
    host: HostCompiler
    nvcc: Nvcc


def find_toolchain(nvcc: Optional[str] = None, cxx: Optional[str] = None) -> Toolchain:
    """Both compilers, each seen to work. ToolchainError says what was tried and what to install."""
    host = _host_facts(*_find_host(cxx))
    return Toolchain(host, _nvcc_facts(*_find_nvcc(nvcc), host))


def find_ninja() -> str:
    """The ``ninja`` package's program, or the one on PATH."""
    try:
        import ninja

        packaged = os.path.join(ninja.BIN_DIR, "ninja")
    except ModuleNotFoundError:
        packaged = ""
    for candidate in (packaged, shutil.which("ninja") or ""):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise ToolchainError("ninja is missing, as the Python package and on PATH: pip install 'extend-attn[jit]'")


def pybind11_facts() -> Tuple[str, str]:
    """(version, folder of the headers)."""
    pybind11 = require("pybind11")
    return pybind11.__version__, pybind11.get_include()


def python_include() -> str:
    """The folder of Python.h. ToolchainError if it is not installed."""
    import sysconfig

    folder = sysconfig.get_path("include")
    if not os.path.isfile(os.path.join(folder, "Python.h")):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ToolchainError(
            f"Python.h is not in {folder}: install Python's headers (Debian, Ubuntu: python{version}-dev)"
        )
    return folder


def _absolute(name: str) -> Optional[str]:
    """A program by path or by name on PATH, as an absolute path that keeps its own name: g++ may be a link to a program
    that goes by the name it is called."""
    found = shutil.which(os.path.expanduser(name))
    return os.path.abspath(found) if found else None


def _find_host(argument: Optional[str]) -> Tuple[str, str]:
    """(path, where it was found)."""
    tried = []
    for where, name in (("argument cxx", argument), ("CXX", os.environ.get("CXX")), ("PATH", "g++")):
        if not name:
            continue
        path = _absolute(name)
        if path:
            return path, where
        tried.append(f"{where} ({name})")
        if where != "PATH":
            hint = " (one program, without options or a launcher)" if len(shlex.split(name)) > 1 else ""
            raise ToolchainError(f"no C++ compiler: {where} is {name!r}, which is not a program{hint}; {INSTALL_HOST}")
    raise ToolchainError(f"no C++ compiler: tried {', '.join(tried)}; {INSTALL_HOST}")


def _find_nvcc(argument: Optional[str]) -> Tuple[str, str]:
    """(path, where it was found)."""
    if argument:
        path = _absolute(argument)
        if not path:
            raise ToolchainError(f"no nvcc: argument nvcc is {argument!r}, which is not a program; {INSTALL_NVCC}")
        return path, "argument nvcc"
    tried = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        folder = os.environ.get(variable)
        if not folder:
            tried.append(f"{variable} (not set)")
            continue
        path = _absolute(os.path.join(folder, "bin", "nvcc"))
        if path:
            return path, variable
        tried.append(f"{variable} ({folder} has no bin/nvcc)")
    path = _absolute("nvcc")
    if path:
        return path, "PATH"
    tried.append("PATH")
    for path in _packaged_nvccs():
        return path, "PyPI package nvidia-cuda-nvcc"
    tried.append("the PyPI package nvidia-cuda-nvcc")
    raise ToolchainError(f"no nvcc: tried {', '.join(tried)}; {INSTALL_NVCC}")


def _packaged_nvccs() -> List[str]:
    """nvcc of the PyPI packages on sys.path, newest CUDA first: they share a folder nvidia/cu<major> that is a
    toolkit."""
    found = [
        p for folder in sys.path for p in glob.glob(os.path.join(glob.escape(folder or "."), "nvidia/cu*/bin/nvcc"))
    ]
    working = [os.path.abspath(path) for path in found if os.access(path, os.X_OK)]
    return sorted(working, key=lambda path: int(re.search(r"nvidia/cu(\d+)", path)[1]), reverse=True)


def _run(command: List[str], what: str, remedy: str) -> str:
    """stdout and stderr of a tool; ToolchainError with its own words if it fails."""
    environment = {**os.environ, "LC_ALL": "C"}  # answers are read
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment,
            timeout=PROBE_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"{what}: {error}; {remedy}") from None
    if done.returncode:
        output = done.stdout.strip()[-2000:]
        raise ToolchainError(f"{what}: {shlex.join(command)} failed ({done.returncode}):\n{output}\n{remedy}")
    return done.stdout


def _compiles(command: List[str], suffix: str, source: str, what: str, remedy: str) -> None:
    """One line is compiled: a compiler that answers questions may still lack its headers or its other half."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"probe{suffix}")
        with open(path, "w", encoding="utf-8") as file:
            file.write(source)
        _run([*command, STANDARD, "-c", path, "-o", os.path.join(folder, "probe.o")], what, remedy)


def _host_facts(path: str, found: str) -> HostCompiler:
    def ask() -> Dict[str, Any]:
        what = f"the C++ compiler {path} (from {found}) does not work"
        version, machine, library = (
            _run([path, *question], what, INSTALL_HOST).strip()
            for question in (
                ("-dumpfullversion", "-dumpversion"),
                ("-dumpmachine",),
                ("-print-file-name=libstdc++.so.6",),
            )
        )
        _compiles([path], ".cpp", "#include <string>\nstd::string f() { return {}; }\n", what, INSTALL_HOST)
        return {
            "version": version,
            "machine": machine,
            "library": os.path.abspath(library),
            "glibcxx": newest_glibcxx(library),
        }

    facts = cache.remembered(f"host {path}", ask, lambda facts: (path, facts["library"]))
    return HostCompiler(path, found, facts["version"], facts["machine"], facts["glibcxx"])


def _nvcc_facts(path: str, found: str, host: HostCompiler) -> Nvcc:
    def ask() -> Dict[str, Any]:
        what = f"nvcc {path} (from {found}) with the C++ compiler {host.path} {host.version} does not work"
        version = re.search(r"release [\d.]+, V([\d.]+)", _run([path, "--version"], what, INSTALL_NVCC))
        archs = re.findall(r"sm_(\d+[af]?)", _run([path, "--list-gpu-code"], what, INSTALL_NVCC))
        if not version or not archs:
            raise ToolchainError(
                f"{what}: its answers to --version and --list-gpu-code are not an nvcc's; {INSTALL_NVCC}"
            )
        ccbin = ["-ccbin", host.path]
        dry_run = _run([path, "--dryrun", *ccbin, "-c", "-x", "cu", os.devnull, "-o", "probe.o"], what, INSTALL_NVCC)
        top = os.path.realpath(_dry_run_values(dry_run, "TOP")[0])
        includes = [flag[2:] for flag in _dry_run_values(dry_run, "INCLUDES") if flag.startswith("-I")]
        _compiles([path, *ccbin], ".cu", "__global__ void probe() {}\n", what, INSTALL_NVCC)
        return {
            "version": version[1],
            "includes": [os.path.realpath(folder) for folder in includes],
            "cudart": _find_cudart(top, dry_run, host.path),
            "archs": archs,
            "program": os.path.join(top, "bin", "nvcc"),
        }

    def files(facts: Dict[str, Any]) -> List[str]:
        """``path`` may be a script that calls the real program; the host compiler's file stands for its version."""
        return [p for p in (path, facts["program"], facts["cudart"], host.path) if os.path.exists(p)]

    facts = cache.remembered(f"nvcc {path} host {host.path}", ask, files)
    return Nvcc(path, found, facts["version"], tuple(facts["includes"]), facts["cudart"], tuple(facts["archs"]))


def _dry_run_values(text: str, name: str) -> List[str]:
    """The words of ``#$ NAME=...`` in what ``nvcc --dryrun`` prints."""
    match = re.search(rf"^#\$ {name}=(.*)$", text, re.MULTILINE)
    return shlex.split(match[1]) if match else []


def _find_cudart(top: str, dry_run: str, host: str) -> str:
    """libcudart_static.a: where nvcc looks, where the PyPI packages have it (lib), where a distribution has it."""
    name = "libcudart_static.a"
    folders = [flag[2:] for flag in _dry_run_values(dry_run, "LIBRARIES") if flag.startswith("-L")]
    folders += [os.path.join(top, "lib"), os.path.join(top, "lib64")]
    for folder in folders:
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.realpath(os.path.join(folder, name))
    printed = _run([host, f"-print-file-name={name}"], f"{name} is missing", INSTALL_NVCC).strip()
    if os.path.isabs(printed):
        return os.path.realpath(printed)
    raise ToolchainError(
        f"{name} is in none of {', '.join(folders)}: install the CUDA runtime's development files "
        "(Debian, Ubuntu: cuda-cudart-dev; PyPI: nvidia-cuda-runtime)"
    )


def newest_glibcxx(path: str) -> str:
    """The newest GLIBCXX version named in an ELF file: of a libstdc++ what it offers, of a module what it needs. "" if
    none."""
    with open(path, "rb") as file:
        found = re.findall(rb"GLIBCXX_(\d+(?:\.\d+)+)\0", file.read())
    return max((text.decode() for text in found), key=lambda v: tuple(map(int, v.split("."))), default="")


def facts(toolchain: Toolchain) -> Dict[str, Dict[str, Any]]:
    """As plain data, for build.json, ``jit info`` and ``doctor``."""
    return {"host": asdict(toolchain.host), "nvcc": asdict(toolchain.nvcc)}
