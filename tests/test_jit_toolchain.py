"""Compilers: the order in which they are looked for, what is said when there are none, what is asked and how often."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from jit_env import logging_compiler, needs_compilers, write_program

from extend_attn.cli import doctor
from extend_attn.cli import jit as cli
from extend_attn.jit import ToolchainError, cache, devices, toolchain
from extend_attn.jit.spec import ALL_ARCHS, Arch

pytest.importorskip("filelock")  # and loaded before sys.path is emptied


@pytest.fixture(autouse=True)
def nothing_set(tmp_path, monkeypatch):
    """No variable names a compiler, PATH is an empty folder, no package brings nvcc, and the cache is a new one."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(toolchain.sys, "path", [str(tmp_path / "site")])


def test_nvcc_is_looked_for_in_the_written_order(tmp_path, monkeypatch):
    nvcc = {name: write_program(tmp_path / name / "bin" / "nvcc") for name in ("home", "path", "argument")}
    packaged = write_program(tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc")
    write_program(tmp_path / "site" / "nvidia" / "cu12" / "bin" / "nvcc")

    assert toolchain._find_nvcc(None) == (str(packaged), "PyPI package nvidia-cuda-nvcc")
    on_path = write_program(tmp_path / "bin" / "nvcc")
    assert toolchain._find_nvcc(None) == (str(on_path), "PATH")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    assert toolchain._find_nvcc(None) == (str(nvcc["path"]), "CUDA_PATH")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert toolchain._find_nvcc(None) == (str(nvcc["home"]), "CUDA_HOME")
    assert toolchain._find_nvcc(str(nvcc["argument"])) == (str(nvcc["argument"]), "argument nvcc")


def test_a_host_compiler_is_looked_for_in_the_written_order(tmp_path, monkeypatch):
    named, other = write_program(tmp_path / "a" / "g++-10"), write_program(tmp_path / "b" / "g++-11")
    on_path = write_program(tmp_path / "bin" / "g++")
    assert toolchain._find_host(None) == (str(on_path), "PATH")
    monkeypatch.setenv("CXX", str(other))
    assert toolchain._find_host(None) == (str(other), "CXX")
    assert toolchain._find_host(str(named)) == (str(named), "argument cxx")


def test_what_is_missing_is_said_with_what_was_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "toolkit"))
    with pytest.raises(ToolchainError) as caught:
        toolchain._find_nvcc(None)
    message = str(caught.value)
    for part in (
        "CUDA_HOME (not set)",
        "CUDA_PATH (",
        "has no bin/nvcc",
        "PATH",
        "nvidia-cuda-nvcc",
        "extend-attn[cuda]",
    ):
        assert part in message
    with pytest.raises(ToolchainError, match=r"tried PATH \(g\+\+\).*apt-get install g\+\+"):
        toolchain._find_host(None)


def test_what_was_named_is_not_replaced(tmp_path, monkeypatch):
    """Another compiler than the one that was named would be a surprise."""
    write_program(tmp_path / "bin" / "g++")
    write_program(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("CXX", "g++-99")
    with pytest.raises(ToolchainError, match="CXX is 'g..-99', which is not a program"):
        toolchain._find_host(None)
    monkeypatch.setenv("CXX", "ccache g++")
    with pytest.raises(ToolchainError, match="without options or a launcher"):
        toolchain._find_host(None)
    with pytest.raises(ToolchainError, match="argument nvcc is 'nvcc-99'"):
        toolchain._find_nvcc("nvcc-99")


def test_a_compiler_that_does_not_work_is_an_error_with_its_words(tmp_path):
    broken = write_program(tmp_path / "bin" / "g++", "echo cc1plus is missing; exit 1")
    with pytest.raises(ToolchainError) as caught:
        toolchain.find_toolchain()
    message = str(caught.value)
    assert (
        str(broken) in message and "from PATH" in message and "cc1plus is missing" in message and "apt-get" in message
    )


def test_ninja_and_the_extra_are_named_when_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(ToolchainError, match=r"ninja is missing.*extend-attn\[jit\]"):
        toolchain.find_ninja()
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(ToolchainError, match=r"'pybind11' is missing: pip install 'extend-attn\[jit\]'"):
        toolchain.pybind11_facts()


def test_python_headers_are_named_when_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ToolchainError, match=r"Python.h is not in .*python3\.\d+-dev"):
        toolchain.python_include()


def test_newest_symbol_version(tmp_path):
    library = tmp_path / "lib.so"
    library.write_bytes(b"\0GLIBCXX_3.4\0GLIBCXX_3.4.9\0GLIBCXX_3.4.28\0GLIBCXX_DEBUG_MESSAGE\0GLIBC_2.99\0")
    assert toolchain.newest_glibcxx(str(library)) == "3.4.28"
    library.write_bytes(b"")
    assert toolchain.newest_glibcxx(str(library)) == ""


@pytest.fixture
def real(monkeypatch):
    """The machine's compilers again."""
    monkeypatch.undo()
    needs_compilers()


def test_real_compilers_answer_once(real, tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    first = toolchain.find_toolchain()
    assert first.host.version[0].isdigit() and first.host.glibcxx.startswith("3.4.")
    assert os.path.isfile(first.nvcc.cudart) and os.path.isfile(os.path.join(first.nvcc.includes[0], "cuda_runtime.h"))
    first.nvcc.check_archs(tuple(map(Arch.parse, ALL_ARCHS)))

    def no_process(*args, **kwargs):
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    monkeypatch.setattr(subprocess, "run", no_process)
    assert toolchain.find_toolchain() == first


def test_a_host_compiler_that_changes_is_asked_again(real, tmp_path, monkeypatch):
    log = tmp_path / "log"
    cxx = logging_compiler(tmp_path, log)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    toolchain._host_facts(str(cxx), "test")
    asked = log.read_text()
    toolchain._host_facts(str(cxx), "test")
    assert log.read_text() == asked
    os.utime(cxx, (1, 1))
    toolchain._host_facts(str(cxx), "test")
    assert log.read_text() == asked * 2 or len(log.read_text()) > len(asked)


def test_an_architecture_that_nvcc_does_not_know():
    nvcc = toolchain.Nvcc("/usr/bin/nvcc", "PATH", "11.8", (), "", ("80", "90"))
    nvcc.check_archs((Arch.parse("8.0"), Arch.parse("9.0a")))
    with pytest.raises(ToolchainError, match=r"generates no code for 10.0, 12.0; it knows sm_80, sm_90.*install"):
        nvcc.check_archs(tuple(map(Arch.parse, ("8.0", "10.0", "12.0"))))


def test_gpus_are_asked_for_without_torch(monkeypatch):
    monkeypatch.setattr(devices, "_from_driver", lambda: [(9, 0), (8, 0), (9, 0)])
    assert devices.gpu_archs() == ("8.0", "9.0")
    monkeypatch.setattr(devices, "_from_driver", list)
    monkeypatch.setattr(devices, "_from_nvidia_smi", lambda: [(12, 0)])
    assert devices.gpu_archs() == ("12.0",)
    monkeypatch.setattr(devices, "_from_nvidia_smi", list)
    with pytest.raises(ToolchainError, match=r"archs: no GPU.*archs=\('9.0',\)"):
        devices.gpu_archs()


@pytest.mark.parametrize("said, archs", [("echo 9.0; echo 10.0", [(9, 0), (10, 0)]), ("exit 9", []), ("echo no", [])])
def test_nvidia_smi(tmp_path, said, archs):
    write_program(tmp_path / "bin" / "nvidia-smi", said)
    assert devices._from_nvidia_smi() == archs


@pytest.mark.gpu
def test_the_driver_and_torch_agree(monkeypatch):
    import torch

    monkeypatch.undo()
    assert f"{'.'.join(map(str, torch.cuda.get_device_capability()))}" in devices.gpu_archs()
    assert devices.driver_cuda_version() >= (12, 0)


@pytest.mark.parametrize("driver, old", [(None, False), ((13, 0), False), ((13, 2), False), ((12, 8), True)])
def test_a_driver_that_is_too_old_is_reported(monkeypatch, driver, old):
    monkeypatch.setattr(devices, "driver_cuda_version", lambda: driver)
    problem = cli.driver_problem({"version": "13.0.88"})
    assert (problem is not None) == old
    assert not old or ("12.8" in problem and "CUDA_HOME" in problem)


def test_doctor_shows_compilers_or_why_there_are_none(capsys):
    doctor.main(["--json"])
    found = json.loads(capsys.readouterr().out)["compilers"]
    assert found["nvcc"] is None and "no C++ compiler" in found["problem"]  # nothing_set
    doctor.main([])
    assert "cannot compile: no C++ compiler" in capsys.readouterr().out
