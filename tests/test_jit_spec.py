"""What a build is: architectures, selections, sources, hashes; which installed module serves a request."""

from __future__ import annotations

import pytest
from jit_env import write_small_csrc

from extend_attn.jit import cmake, modules
from extend_attn.jit.spec import ALL_ARCHS, DTYPES, Arch, Spec, csrc_folder, default_archs, source_hash

ONE = dict(archs=("9.0",), dtypes=("bfloat16",))


@pytest.mark.parametrize(
    "text, shown, flag",
    [
        ("9.0", "9.0", "-gencode=arch=compute_90,code=sm_90"),
        ("sm_75", "7.5", "-gencode=arch=compute_75,code=sm_75"),
        ("120", "12.0", "-gencode=arch=compute_120,code=sm_120"),
        ("10.0a", "10.0a", "-gencode=arch=compute_100a,code=sm_100a"),
        ("12.0+ptx", "12.0+PTX", "-gencode=arch=compute_120,code=[sm_120,compute_120]"),
    ],
)
def test_arch(text, shown, flag):
    arch = Arch.parse(text)
    assert str(arch) == shown and Arch.parse(shown) == arch
    assert arch.flags() == (flag,)


@pytest.mark.parametrize("text", ["", "9", "hopper", "9.0b", "9.0+SASS", "sm_"])
def test_arch_that_is_none(text):
    with pytest.raises(ValueError, match="archs: got .*'9.0'"):
        Arch.parse(text)


@pytest.mark.parametrize(
    "built, gpu, good",
    [
        ("8.0", "8.0", True),
        ("8.0", "8.6", True),  # newer of the same generation
        ("8.6", "8.0", False),
        ("8.0", "9.0", False),  # another generation
        ("8.0+PTX", "12.0", True),
        ("9.0+PTX", "8.9", False),
        ("9.0a", "9.0", False),
        ("9.0", "9.0a", False),
        ("9.0a", "9.0a", True),
        ("10.0", "10.3", True),
    ],
)
def test_which_gpus_code_runs_on(built, gpu, good):
    assert Arch.parse(built).serves(Arch.parse(gpu)) is good


def test_spec_is_ordered_and_its_numbers_are_bits():
    spec = Spec.of(["9.0", "8.0", "sm_90"], ["float32", "torch.float16"])
    assert spec.arch_text == "8.0/9.0"
    assert (spec.dtypes, spec.dtype_bits) == (("float16", "float32"), 0b101)
    assert "-DEXTEND_ATTN_DTYPE_BITS=5" in spec.defines("")
    assert spec == Spec.of(["8.0", "9.0"], ["float16", "float32"])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(archs=()), "archs: got none"),
        (dict(dtypes=("int8",)), r"dtypes: got \['int8'\]; allowed are float16, bfloat16, float32"),
        (dict(dtypes=()), "dtypes"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Spec.of(**{**ONE, **change})


def test_sources_by_type(tmp_path):
    csrc = write_small_csrc(tmp_path)
    for name in (
        "kernels/sum_fp16.cu",
        "kernels/sum_bf16.cu",
        "kernels/sum_fp32.cu",
        "comm/ipc.cpp",
        "kernels/part.cuh",
    ):
        path = csrc / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")

    def names(*dtypes):
        return [path.name for path in Spec.of(**{**ONE, "dtypes": dtypes}).sources(csrc)]

    assert names("bfloat16") == ["module.cpp", "ipc.cpp", "one.cu", "sum_bf16.cu"]
    assert set(names(*DTYPES)) == {"module.cpp", "ipc.cpp", "one.cu", "sum_fp16.cu", "sum_bf16.cu", "sum_fp32.cu"}


def test_source_hash_sees_contents_names_and_nothing_else(tmp_path):
    csrc = write_small_csrc(tmp_path)
    first = source_hash(csrc)
    (csrc / "kernels" / "one.cu.orig").write_text("left by an editor")
    assert source_hash(csrc) == first
    header = csrc / "portability" / "answer.h"
    text = header.read_text()
    header.write_text(text + "// more\n")
    assert source_hash(csrc) != first
    header.write_text(text)
    assert source_hash(csrc) == first
    header.rename(header.with_name("reply.h"))
    assert source_hash(csrc) != first


def test_csrc_is_found_in_the_checkout():
    assert (csrc_folder() / "portability" / "alignment.h").is_file()


def test_archs_come_from_the_argument_the_variable_the_gpus(monkeypatch):
    monkeypatch.setattr(modules.devices, "gpu_archs", lambda: ("8.9",))
    monkeypatch.delenv("EXTEND_ATTN_ARCHS", raising=False)
    assert modules.make_spec(None, ("float16",)).arch_text == "8.9"
    monkeypatch.setenv("EXTEND_ATTN_ARCHS", "8.0; 9.0")
    assert modules.make_spec(None, ("float16",)).arch_text == "8.0/9.0"
    assert modules.make_spec(("7.5",), ("float16",)).arch_text == "7.5"
    monkeypatch.setenv("EXTEND_ATTN_ARCHS", "all")
    assert tuple(default_archs()) == ALL_ARCHS


def test_ahead_of_time_builds_what_nvcc_knows(monkeypatch):
    monkeypatch.delenv("EXTEND_ATTN_ARCHS", raising=False)
    assert cmake.ahead_archs(["75", "80", "90", "90a"]) == ["7.5", "8.0", "9.0+PTX"]
    monkeypatch.setenv("EXTEND_ATTN_ARCHS", "8.6")
    assert cmake.ahead_archs(["75", "80", "90"]) == ["8.6"]


INFO = {"archs": "8.0/9.0+PTX", "dtype_bits": 0b010, "source_hash": "abc"}


@pytest.mark.parametrize(
    "change, sources, good",
    [
        ({}, "abc", True),
        ({}, "abd", False),  # csrc/ was edited since
        (dict(archs=("8.6", "12.0")), "abc", True),
        (dict(archs=("7.5",)), "abc", False),
        (dict(dtypes=("float16",)), "abc", False),
    ],
)
def test_which_installed_module_serves(change, sources, good):
    assert modules.serves(INFO, Spec.of(**{**ONE, **change}), sources) is good


def test_cmake_gets_the_same_lists():
    lines = cmake.settings(Spec.of(("9.0", "8.0"), ("bfloat16",)))
    text = "\n".join(lines)
    assert "module.cpp]==]" in text and "-gencode=arch=compute_80,code=sm_80]==]" in text
    assert text.count("-std=c++17") == 2  # one for each compiler
    assert ";" not in text  # CMake would split there
