"""The kernels compile for every architecture without a GPU, on this Triton and on others in folders of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_matrix import ARCHITECTURES, HEAD_DIMS, jobs

TESTS = Path(__file__).resolve().parent
OTHERS = "EXTEND_ATTN_OTHER_TRITONS"
# Folders, separated like PATH, that each hold a Triton: pip install --no-deps --target FOLDER triton==VERSION
FOLDERS = [folder for folder in os.environ.get(OTHERS, "").split(os.pathsep) if folder]


def compiling_python(*arguments: str, triton_folder: str = "", timeout: int = 300) -> subprocess.CompletedProcess:
    """Python in a process of its own, where kernels are compiled: this one may have imported Triton as an interpreter,
    beside which Gluon can't be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [triton_folder] if triton_folder else []
    environment["PYTHONPATH"] = os.pathsep.join([*path, str(TESTS.parent / "python"), str(TESTS)])
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def compile_matrix(*arguments: str, triton_folder: str = "") -> str:
    script = str(TESTS / "compile_matrix.py")
    done = compiling_python(script, "--jobs", "1", *arguments, triton_folder=triton_folder, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_sample_has_every_architecture_and_every_head_dim():
    sample = list(jobs(everything=False))
    assert {job[0] for job in sample} == set(ARCHITECTURES)
    assert {job[1] for job in sample} == set(HEAD_DIMS)
    assert {job[2] for job in sample} >= {"tiled", "packed"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_default_plans_compile_and_fit(arch):
    out = compile_matrix("--arch", str(arch))
    assert out.count("\nok ") >= 2, out


@pytest.mark.parametrize("folder", FOLDERS or [None], ids=lambda folder: Path(folder).name if folder else "none")
def test_other_tritons_compile_the_sample(folder):
    if folder is None:
        pytest.skip(f"{OTHERS} names no folder with another Triton")
    version = next(Path(folder).glob("triton-*.dist-info")).name[len("triton-") : -len(".dist-info")]
    out = compile_matrix(triton_folder=folder)
    assert out.startswith(f"Triton {version}"), out
