"""Real builds: of small sources by several processes and killed ones, of csrc/ itself, and what a module needs to
load."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from jit_env import (
    ROOT,
    environment,
    finished,
    know_compilers,
    logging_compiler,
    needs_compilers,
    result,
    start_small,
    write_small_csrc,
)

from extend_attn.jit import BuildError, JitError, build, cache, load_comm_module, modules
from extend_attn.jit.build import FILE, Build
from extend_attn.jit.spec import Spec, csrc_folder
from extend_attn.jit.toolchain import find_toolchain

SMALL_SPEC = Spec.of(("8.0",), ("float32",))
# What one process of a Hopper machine needs.
ONE_PROCESS = dict(archs=("9.0",), dtypes=("bfloat16",))
# Ends the process if it starts another.
NO_PROCESS = """
def audit(event, args):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.forkpty"):
        print("a process was started:", event, args, file=sys.stderr, flush=True)
        import os
        os._exit(9)
sys.addaudithook(audit)
"""


@pytest.fixture(autouse=True)
def compilers():
    needs_compilers()


@pytest.fixture
def csrc(tmp_path):
    return write_small_csrc(tmp_path / "csrc")


@pytest.fixture
def folder(tmp_path):
    """A cache in which nothing is but what is known of compilers."""
    return know_compilers(tmp_path / "cache")


@pytest.fixture
def small(csrc, folder, monkeypatch):
    """Builds of the small sources in this process, in a cache of their own."""
    monkeypatch.setenv(cache.VARIABLE, str(folder))
    monkeypatch.setattr(modules, "csrc_folder", lambda: csrc)
    return csrc


@pytest.mark.parametrize("count", [2, 8])
def test_processes_at_once_share_one_build(csrc, tmp_path, count):
    """From nothing: each would ask the compilers, then build."""
    processes = [start_small(csrc, tmp_path / "cache") for _ in range(count)]
    printed = {result(process) for process in processes}
    assert len(printed) == 1 and printed.pop().startswith("42 ")
    folders = finished(tmp_path / "cache")
    assert len(folders) == 1
    assert sorted(path.name for path in folders[0].iterdir()) == [FILE, cache.MANIFEST]


@pytest.mark.parametrize("seconds", [0.2, 0.6, 1.2])
def test_a_build_that_is_killed_is_made_good_by_the_next(csrc, folder, seconds):
    """At several moments: before, while files are compiled, while they are linked, after."""
    victim, waiting = start_small(csrc, folder), start_small(csrc, folder)
    time.sleep(seconds)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert result(waiting).startswith("42 ")
    assert len(finished(folder)) == 1
    assert result(start_small(csrc, folder, before=NO_PROCESS)).startswith("42 ")


def test_from_the_cache_no_process_is_started_and_no_heavy_import_made(csrc, folder):
    result(start_small(csrc, folder))
    forbid = NO_PROCESS + "\nfor name in ('torch', 'numpy', 'filelock', 'ninja'): sys.modules[name] = None\n"
    assert result(start_small(csrc, folder, before=forbid)).startswith("42 ")


def test_the_audit_hook_of_these_tests_sees_a_build(csrc, folder):
    process = start_small(csrc, folder, before=NO_PROCESS)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 9 and "a process was started" in err


def test_an_error_of_the_compiler_is_shown_and_leaves_nothing(small, folder):
    (small / "kernels" / "one.cu").write_text("__global__ void one() { undeclared = 1; }\n")
    with pytest.raises(BuildError, match='(?s)compiling csrc/ failed.*"undeclared" is undefined'):
        modules.build_module(SMALL_SPEC)
    assert finished(folder) == []
    write_small_csrc(small)
    assert modules.build_module(SMALL_SPEC).is_file()


def test_an_edited_header_makes_another_module(small):
    def answer():
        return modules._load(modules.build_module(SMALL_SPEC)).answer()

    assert answer() == 42
    header = small / "portability" / "answer.h"
    header.write_text(header.read_text().replace("42", "43"))
    assert answer() == 43


def test_a_read_only_cache_is_read(small, monkeypatch):
    """An image may bring its modules along."""
    path = modules.build_module(SMALL_SPEC)
    monkeypatch.setattr(cache, "_why_not_writable", lambda folder: "read-only file system")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert modules.build_module(SMALL_SPEC) == path


def test_a_module_that_does_not_load_is_explained(small):
    path = modules.build_module(SMALL_SPEC)
    path.write_bytes(b"not a library")
    with pytest.raises(JitError, match="cannot be loaded.*set CXX"):
        modules._load(path)


def test_ccbin_is_the_host_compiler(csrc, tmp_path):
    """CXX compiles the host half of .cu files and links too; the g++ on PATH is not asked."""
    log = tmp_path / "log"
    cxx = logging_compiler(tmp_path / "named", log)
    trap = logging_compiler(tmp_path / "trap", tmp_path / "trapped")
    path = os.pathsep.join([str(trap.parent), os.environ["PATH"]])
    assert result(start_small(csrc, tmp_path / "cache", CXX=str(cxx), PATH=path)).startswith("42 ")
    asked = log.read_text()
    assert "module.cpp" in asked and "one.cu" in asked and "-shared" in asked
    assert not (tmp_path / "trapped").exists()


def test_the_key_is_over_all_that_makes_a_module(csrc, monkeypatch):
    tools = find_toolchain()
    first = Build(SMALL_SPEC, tools, csrc)
    key = first.key()
    keys = {
        "again": key,
        "arch": replace(first, spec=Spec.of(("9.0",), ("float32",))).key(),
        "types": replace(first, spec=Spec.of(("8.0",), ("float16",))).key(),
        "host": replace(first, toolchain=replace(tools, host=replace(tools.host, version="10.2.1"))).key(),
        "libstdc++": replace(first, toolchain=replace(tools, host=replace(tools.host, glibcxx="3.4.28"))).key(),
        "nvcc": replace(first, toolchain=replace(tools, nvcc=replace(tools.nvcc, version="12.8.0"))).key(),
    }
    assert keys["again"] == first.key()
    for name, value in (("HOST_FLAGS", ("-O0",)), ("NVCC_FLAGS", ()), ("LINK_FLAGS", ()), ("FILE", "_comm.abi3.so")):
        with monkeypatch.context() as patch:
            patch.setattr(build, name, value)
            keys[name] = first.key()
    for name in ("NVCC_APPEND_FLAGS", "CPATH"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "-g")
            keys[name] = first.key()
    (csrc / "portability" / "answer.h").write_text("constexpr int kAnswer = 43;\n")
    keys["header"] = first.key()
    assert len(set(keys.values())) == len(keys), keys


def test_every_command_states_cxx17(csrc):
    text = Build(Spec.of(("7.5", "12.0"), ("float32",)), find_toolchain(), csrc).ninja_file()
    commands = [line for line in text.splitlines() if " -c $in" in line]
    assert len(commands) == 2 and all(" -std=c++17 " in line for line in commands)
    assert not re.search(r"-std=(?!c\+\+17 )", text)


def test_paths_with_spaces(tmp_path):
    csrc = write_small_csrc(tmp_path / "a b")
    assert result(start_small(csrc, know_compilers(tmp_path / "ca che"))).startswith("42 ")


@pytest.fixture(scope="module")
def module():
    """csrc/ as one process of a Hopper machine needs it, from the user's cache or compiled now."""
    return load_comm_module(**ONE_PROCESS)


def test_the_real_module(module):
    info = module.build_info()
    assert info["cplusplus"] == 201703 and info["archs"] == "9.0"
    assert info["dtype_bits"] == 0b010
    assert load_comm_module(**ONE_PROCESS) is module


def test_a_misaligned_pointer_is_refused(module):
    module.check_aligned(1024)
    with pytest.raises(ValueError, match="pointer: got address 1001, 9 bytes past a multiple of 16"):
        module.check_aligned(1001)
    module.check_aligned(1004, bytes=4)


def test_the_real_module_needs_no_cuda_library(module):
    """The CUDA runtime is inside, so that the module loads without a GPU and beside any torch."""
    if not shutil.which("readelf"):
        pytest.skip("needs readelf")
    needed = subprocess.run(["readelf", "-d", module.__file__], stdout=subprocess.PIPE, text=True, check=True).stdout
    libraries = re.findall(r"\(NEEDED\).*\[(.*?)\]", needed)
    assert libraries and not [name for name in libraries if "cuda" in name or "torch" in name]


def test_two_builds_live_in_one_process(module, tmp_path):
    """Under the same name, pybind11 would give out the first one twice; a class that is registered twice is an
    ImportError."""
    copy = tmp_path / "other" / FILE
    copy.parent.mkdir()
    shutil.copy(module.__file__, copy)
    other = modules._load(copy)
    assert other is not module and other.check_aligned is not module.check_aligned
    assert (Path(module.__file__), Path(other.__file__)) == (modules.build_module(Spec.of(**ONE_PROCESS)), copy)
    assert other.build_info() == module.build_info()


def test_command_line(folder):
    """build, info, clean as a user runs them, in a folder of their own."""

    def run(*arguments):
        command = [sys.executable, "-m", "extend_attn", "jit", *arguments]
        done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, timeout=120, cwd=ROOT)
        return done.returncode, done.stdout, done.stderr

    code, _, err = run("build", "--arch", "nine")
    assert code == 2 and "archs: got 'nine'" in err
    code, _, err = run("build", "--arch", "9.0", "--cxx", "g++-99")
    assert code == 1 and "g++-99" in err and "install" in err
    code, out, _ = run("info", "--json")
    data = json.loads(out)
    assert code == 0 and data["folders"][0] == str(folder) and data["builds"] == []
    assert data["compilers"]["host"]["version"] and not data["compilers"]["problem"]
    code, out, _ = run("info")
    assert code == 0 and data["compilers"]["nvcc"]["path"] in out
    code, out, _ = run("clean")
    assert code == 0 and "removed" in out and not list((folder / "probes").iterdir())


def test_sources_are_those_of_this_checkout():
    assert csrc_folder() == ROOT / "csrc"
