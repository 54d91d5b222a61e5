"""What the tests of the JIT share: a cache folder of their own, small sources that compile in a second, fresh
processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

import pytest

from extend_attn.jit import JitError, cache
from extend_attn.jit.toolchain import find_toolchain

ROOT = Path(__file__).resolve().parent.parent

# As little as has all the parts of csrc/: bindings for the host compiler, a kernel for nvcc, a header. Without
# pybind11, whose headers alone take 4 s.
SMALL = {
    "bindings/module.cpp": """
#include <Python.h>
#include "portability/answer.h"
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(kAnswer); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_comm", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__comm() { return PyModule_Create(&module); }
""",
    "kernels/one.cu": '#include "portability/answer.h"\n__global__ void one(float* x) { x[threadIdx.x] += kAnswer; }\n',
    "portability/answer.h": "constexpr int kAnswer = 42;\n",
}


def write_small_csrc(folder: Path) -> Path:
    """The small sources in ``folder``."""
    for name, text in SMALL.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def know_compilers(folder: Path) -> Path:
    """The cache in ``folder`` with what the user's knows of compilers: asking takes 2 s, and few tests are about it."""
    find_toolchain()
    for root in cache.roots():
        if (root / "probes").exists():
            shutil.copytree(root / "probes", folder / "probes", dirs_exist_ok=True)
    return folder


def have_compilers() -> str:
    """Empty if nvcc and a host compiler are here, else why not."""
    try:
        find_toolchain()
        return ""
    except JitError as error:
        return str(error)


def needs_compilers() -> None:
    """Skips the test, with the reason, where nothing can be compiled."""
    reason = have_compilers()
    if reason:
        pytest.skip(reason)


# A process of its own that loads the small module; with {before} run first.
LOAD_SMALL = """
import sys, pathlib
from extend_attn.jit import load_comm_module, modules
modules.csrc_folder = lambda: pathlib.Path({csrc!r})
{before}
module = load_comm_module(archs=("8.0",), dtypes=("float32",))
print(module.answer(), module.__file__)
"""


def environment(cache: Path, **more: str) -> Dict[str, str]:
    """This environment with a cache folder of its own and the package on the path."""
    path = os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "EXTEND_ATTN_CACHE_DIR": str(cache), **more}


def start_small(csrc: Path, cache: Path, before: str = "", **more: str) -> subprocess.Popen:
    """A process that loads the small module."""
    code = LOAD_SMALL.format(csrc=str(csrc), before=before)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(cache, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen) -> str:
    """stdout of a process that must end well."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip()


def write_program(path: Path, *lines: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


def finished(cache: Path) -> List[Path]:
    """Everything in the folder of modules, hidden things too: finished builds and what killed ones left."""
    folder = cache / "modules"
    return sorted(folder.iterdir()) if folder.exists() else []


def logging_compiler(folder: Path, log: Path) -> Path:
    """A ``g++`` that writes down what it is asked before it calls the real one."""
    real = shutil.which("g++")
    return write_program(folder / "g++", f'echo "$@" >> {log}', f'exec {real} "$@"')
