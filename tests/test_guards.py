"""Calls recognised by torch's check of all tensors at once: what it says nothing about is looked at all the same."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from test_host import FULL, LENGTHS, case, known

from extend_attn import calls, guards
from extend_attn import inputs as checks

pytestmark = pytest.mark.skipif(guards._TensorGuards is None, reason="this torch has no TensorGuards")


@pytest.fixture(autouse=True)
def nothing_remembered():
    calls.forget()
    yield
    calls.forget()


@pytest.fixture
def facts(monkeypatch):
    """The calls whose facts were asked for one by one."""
    asked = []
    ask = calls._facts
    monkeypatch.setattr(calls, "_facts", lambda *arguments: asked.append(arguments) or ask(*arguments))
    return asked


@pytest.mark.parametrize("spec", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("unified", [False, True])
def test_a_guard_recognises_other_addresses_and_lengths(facts, unified, spec):
    one = case(unified, **spec)
    known(one)
    assert len(facts) == 1
    cut = {"cut": [1, 2, 3]} if spec else {}
    pools = {name: one.kwargs[name] for name in ("k_buffer", "v_buffer")}  # of one size in an engine
    for lengths in (LENGTHS, [(3, 1), (30, 4), (1, 2)], [(0, 0), (1, 0)]):
        other = case(unified, lengths, seed=7, **{**spec, **cut})
        checked, prepared = known(other, **pools)
        assert prepared.problem.batch_size == len(lengths) == checked.batch_size
        assert prepared.problem.num_tokens == checked.q.shape[0]
    assert len(facts) == 1


def test_a_guard_does_not_overlook_short_arrays(monkeypatch):
    made = []
    check = checks.two_stage
    monkeypatch.setattr(checks, "two_stage", lambda *args, **kwargs: made.append(1) or check(*args, **kwargs))
    one = case(**FULL)
    known(one)
    for name in ("kv_indptr", "mask_indptr", "window_kv_offsets", "sinks"):
        with pytest.raises(ValueError, match=f"^{name}"):
            known(one, **{name: one.kwargs[name][:1]})
    assert len(made) == 5


def test_guards_in_inference_mode(facts):
    """The tensors of an engine are made and used there; a call outside is another one to torch."""
    with torch.inference_mode():
        one = case()
        known(one), known(one)
        assert len(facts) == 1
    plain = case()
    known(plain), known(plain)
    assert len(facts) <= 2


def test_a_guard_holds_no_tensor():
    one = case()
    held = [weakref.ref(t) for t in one.kwargs.values() if isinstance(t, torch.Tensor)]
    known(one)
    assert calls._guards
    del one
    gc.collect()
    assert not any(ref() is not None for ref in held)


def test_guards_are_bounded():
    one = case()
    for dim in (32, 48, 64, 80, 96, 112, 128):
        known(case(dim=dim))
    assert all(len(some) <= calls.MAX_GUARDS for some in calls._guards.values())
    known(one)
