"""How the contract tests run: each on the plain reference, on the kernels under Triton's interpreter, and on a GPU.

The fixture ``mode`` (see modes.py) says where a test runs and through which kernels. Triton decides when a kernel is
*decorated* whether it will be interpreted, so the kernels are imported here with the interpreter on, before any test;
the library decides a call at a time, and only tests of an interpreted mode set the variable. A process that sees a GPU
compiles instead; there the interpreted modes are skipped (hide the GPU with ``CUDA_VISIBLE_DEVICES=`` to run them).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil

import pytest
import torch
from modes import BY_NAME, Mode, modes

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRET = "TRITON_INTERPRET"

# xdist already uses every core; threads on top of that only fight.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def _import_interpreted() -> None:
    """Import Triton and the kernels with the interpreter on, then restore the environment (subprocesses inherit it)."""
    before = os.environ.get(INTERPRET)
    os.environ[INTERPRET] = "1"
    try:
        importlib.import_module("triton.language")
        kernels = importlib.import_module("extend_attn.kernels")
        for module in pkgutil.iter_modules(kernels.__path__):
            if not module.ispkg:
                importlib.import_module(f"extend_attn.kernels.{module.name}")
        importlib.import_module("extend_attn.attention")
    finally:
        if before is None:
            del os.environ[INTERPRET]
        else:
            os.environ[INTERPRET] = before


if HAS_TRITON and not HAS_GPU:
    _import_interpreted()


def pytest_generate_tests(metafunc) -> None:
    """A test that takes ``mode`` and does not say which runs in all of them."""
    said = any(
        "mode" in str(mark.args[0]).replace(" ", "").split(",")
        for mark in metafunc.definition.iter_markers("parametrize")
    )
    if "mode" in metafunc.fixturenames and not said:
        metafunc.parametrize("mode", modes(), indirect=True)


def pytest_collection_modifyitems(items) -> None:
    if not HAS_GPU:
        skip = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _give_memory_back(request):
    """Worker processes share the GPU: what one test's oracle needed must not stay in its process's cache."""
    yield
    if HAS_GPU and request.node.get_closest_marker("gpu") and torch.cuda.memory_reserved() > 1 << 30:
        torch.cuda.empty_cache()


@pytest.fixture
def mode(request, monkeypatch) -> Mode:
    chosen = BY_NAME[request.param]
    if chosen.kernel and not chosen.gpu:
        if not HAS_TRITON:
            pytest.skip("needs Triton")
        if HAS_GPU:
            pytest.skip("a process with a GPU compiles its kernels: run with CUDA_VISIBLE_DEVICES= to interpret them")
        monkeypatch.setenv(INTERPRET, "1")
    elif not chosen.gpu:
        monkeypatch.delenv(INTERPRET, raising=False)
    return chosen


@pytest.fixture
def answers(monkeypatch):
    """The workers of ``tune`` answer by themselves and nothing is compiled: set ``times``, read what was ``asked``."""
    from tuned import Answers

    from extend_attn.bench.tuning import tune

    monkeypatch.setattr(tune, "WorkerProcess", Answers)
    monkeypatch.setattr(tune, "compile_all", lambda *arguments, **options: None)
    Answers.asked, Answers.times = [], {}
    return Answers
