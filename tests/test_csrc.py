"""The C++/CUDA sources as text and as what compilers make of them, without a GPU: levels, arrows, sizes,
architectures."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Dict, Set

import pytest
from compile_csrc import compile_kernels
from jit_env import ROOT, needs_compilers

from extend_attn.jit import spec

CSRC = ROOT / "csrc"
FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh", ".cpp", ".cu"})
# Folder -> folders whose headers it may include.
ARROWS: Dict[str, Set[str]] = {
    "portability": set(),
    "comm": {"portability"},
    "kernels": {"comm", "portability"},
    "bindings": {"kernels", "comm", "portability"},
}
MAX_LINES = 400
# Library headers and names of C++20 (libstdc++ of Debian 11 has some of them, none completely).
CXX20 = (
    "bit_cast",
    "<bit>",
    "<concepts>",
    "<span>",
    "<ranges>",
    "<format>",
    "<source_location>",
    "<version>",
    "consteval",
)


def includes(path: Path):
    """Folders of csrc/ that ``path`` includes headers of."""
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.M):
        found = [folder / name for folder in (path.parent, CSRC) if (folder / name).is_file()]
        assert found, f"{path.relative_to(ROOT)} includes {name}, which is not in csrc/"
        yield found[0].resolve().relative_to(CSRC).parts[0]


def test_the_readers_below_see_files():
    assert {path.suffix for path in FILES} == {".h", ".cuh", ".cpp", ".cu"}
    assert "portability" in set(includes(CSRC / "bindings" / "module.cpp"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CSRC)))
def test_file(path):
    """One subject, one direction of includes, C++17, no torch, nothing that ends the process."""
    text = path.read_text(encoding="utf-8")
    folder = path.relative_to(CSRC).parts[0]
    assert len(text.splitlines()) <= MAX_LINES
    assert text.startswith("// ") or path.with_suffix(".h").is_file(), "a file or its header says what its subject is"
    assert set(includes(path)) - {folder} <= ARROWS[folder]
    assert not [word for word in CXX20 if word in text]
    assert not re.search(r"#\s*include\s+[<\"](torch|ATen|c10)/", text)
    assert not re.search(r"\b(exit|abort|_exit)\s*\(", text)


def test_formatter():
    """By the configuration in .clang-format."""
    clang_format = pytest.importorskip("clang_format")
    program = Path(clang_format.__file__).parent / "data" / "bin" / "clang-format"
    command = [str(program), "--dry-run", "-Werror", "--style=file", *map(str, FILES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_alignment_is_tested_in_one_place():
    """By reinterpret_cast<std::uintptr_t>, in portability/alignment.h."""
    pattern = re.compile(r"reinterpret_cast<std::uintptr_t>\([^)]*\)\s*[%&]")
    assert [path.name for path in FILES if pattern.search(path.read_text(encoding="utf-8"))] == ["alignment.h"]


def test_both_compilers_are_told_cxx17():
    assert spec.STANDARD == "-std=c++17"
    assert spec.STANDARD in spec.HOST_FLAGS and spec.STANDARD in spec.NVCC_FLAGS
    assert "__cplusplus == 201703L" in (CSRC / "portability" / "selection.h").read_text(encoding="utf-8")
    assert "CXX_STANDARD 17" in (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    assert "CUDA_STANDARD 17" in (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")


def test_kernels_compile_for_old_and_new_gpus():
    """The oldest and the newest generation, and one between; CI's compile job has all (compile_csrc.py --all)."""
    needs_compilers()
    assert compile_kernels(("7.5", "8.0", "12.0"), ("bfloat16",)) >= 1
