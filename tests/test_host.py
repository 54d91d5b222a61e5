"""What a repeated call costs the host: not the checks again, never an answer of another call."""

from __future__ import annotations

import inspect
import math
import threading
from unittest import mock

import pytest
import test_errors
import torch
from cases import make_case

import extend_attn
from extend_attn import attention, calls, guards
from extend_attn import inputs as checks

FULL = dict(mask="random", mask_prefix=True, window=9, cut=[0, 0], sinks=torch.float32, logit_cap=20.0)
LENGTHS = [(17, 8), (4, 5)]


@pytest.fixture(autouse=True, params=["guards", "signatures"])
def nothing_remembered(request, monkeypatch):
    """With torch's check of all tensors at once, and as where torch has none."""
    if request.param == "signatures":
        monkeypatch.setattr(guards, "_TensorGuards", None)
    calls.forget()
    yield
    calls.forget()


@pytest.fixture
def full_checks(monkeypatch):
    """Names of the full checks that were made, in order."""
    made = []

    def counting(name):
        check = getattr(checks, name)

        def count(*args, **kwargs):
            made.append(name)
            return check(*args, **kwargs)

        return count

    for name in ("two_stage", "unified"):
        monkeypatch.setattr(checks, name, counting(name))
    return made


def case(unified=False, lengths=LENGTHS, **spec):
    return make_case(**{"lengths": lengths, "layout": "plain", "unified": unified, **spec})


def bound(one, changed):
    """(the public function, all its arguments) of a case, with some arguments changed."""
    function = extend_attn.extend_attention_fwd_unified if one.spec.unified else extend_attn.extend_attention_fwd
    out = {"o" if one.spec.unified else "o_extend": one.out()[0]}
    arguments = inspect.signature(function).bind(**{**out, **one.kwargs, **changed})
    arguments.apply_defaults()
    return function, arguments.arguments


def call(one, **changed):
    """The output; with ``return_lse`` also the LSE."""
    function, arguments = bound(one, changed)
    lse = function(**arguments)
    out = arguments["o" if one.spec.unified else "o_extend"]
    return out if lse is None else (out, lse)


def known(one, **changed):
    """(Inputs, Prepared) of the call, which is not run."""
    function, arguments = bound(one, changed)
    with mock.patch.object(attention, "_run", lambda call, *_: call):
        prepared, checked, _, _ = function(**arguments)
    return checked, prepared


@pytest.mark.parametrize("spec", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("unified", [False, True])
def test_a_repeated_call_is_not_checked_again(full_checks, monkeypatch, unified, spec):
    one = case(unified, **spec)
    first = call(one, return_lse=True)
    assert len(full_checks) == 1
    monkeypatch.setattr(checks.Inputs, "problem", None)  # nor is its problem posed again
    again = call(one, return_lse=True)
    assert len(full_checks) == 1
    for a, b in zip(first, again):
        assert torch.equal(a, b) or (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))


@pytest.mark.parametrize("unified", [False, True])
def test_a_repeated_call_gets_what_the_full_check_makes(unified):
    """Field by field, of two calls at other addresses and with other lengths."""
    known(case(unified, **FULL))
    other = case(unified, [(3, 1), (30, 40), (1, 2)], seed=7, **{**FULL, "cut": [0, 0, 1]})
    arguments = dict(other.kwargs, max_len_prefix=64, return_lse=True)
    known(other, **arguments)
    o = other.out()[0]
    arguments["o" if unified else "o_extend"] = o
    assert len(calls._known) == 2  # with the LSE and without
    checked, prepared = known(other, **arguments)
    assert len(calls._known) == 2
    calls.forget()
    full, first = known(other, **arguments)
    assert prepared is not first and prepared.problem == first.problem
    for name, a, b in zip(checks.Inputs._fields, checked, full):
        if name == "lse":
            assert a is not b and torch.equal(a, b) and torch.isinf(a).all()
        else:
            assert a is b or (not isinstance(b, torch.Tensor) and type(a) is type(b) and a == b), name


def test_other_lengths_are_not_checked_again_but_are_another_problem(full_checks):
    call(case())
    for lengths in ([(17, 8), (4, 5)], [(2, 8), (4, 5)], [(2, 1), (4, 5), (6, 7)], [(40, 99)]):
        one = case(lengths=lengths)
        out = call(one)
        expected = one.expected.out
        assert (out[: expected.shape[0]].double() - expected).abs().nan_to_num().max() < 1e-5
        problem = known(one)[1].problem
        assert problem.batch_size == len(lengths)
        assert problem.num_tokens == one.kwargs["q_extend"].shape[0]
        assert problem.num_kv_indices == one.kwargs["kv_indices"].numel()
    assert len(full_checks) == 1


BAD = {key: row for key, row in test_errors.BAD.items() if key[0] not in ("plan", "tile", "batch_invariant")}


@pytest.mark.parametrize("unified", [False, True])
def test_a_pool_of_another_size_is_prepared_anew(full_checks, unified):
    """Kernels prefetch within the pool whose rows they were told."""
    one = case(unified)
    _, first = known(one)
    grown = {}
    for name in ("k_buffer", "v_buffer"):
        pool = one.kwargs[name]
        grown[name] = torch.cat([pool, pool])
    _, other = known(one, **grown)
    assert other is not first and other.problem == first.problem and len(full_checks) == 1
    assert known(one)[1] is first


@pytest.mark.parametrize("key", BAD, ids=lambda key: "-".join(key).replace(" ", "_"))
def test_a_bad_call_after_a_good_one_that_has_everything(full_checks, key):
    """The mistakes of test_errors.py, which follow a call without sinks, offsets and positions there."""
    one = case(**FULL, tree_positions=True)
    known(one)
    make, error, _ = BAD[key]
    with pytest.raises(error, match=f"^{key[0]}"):
        known(one, **{key[0]: make(dict(one.kwargs, o_extend=one.out()[0]))})
    assert len(full_checks) == 2


def _offset(tensor, elements=1):
    """The same values at an address that is moved by so many elements."""
    moved = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)[elements:].view(tensor.shape)
    return moved.copy_(tensor)


def _strided(tensor):
    """The same values with a gap behind each head."""
    wide = torch.full((*tensor.shape[:2], tensor.shape[2] + 16), math.nan, dtype=tensor.dtype)
    wide[..., : tensor.shape[2]] = tensor
    return wide[..., : tensor.shape[2]]


class _Tensor(torch.Tensor):
    pass


# A good call's neighbours that are good too, and must be looked at anew.
OTHERS = {
    "q dtype": lambda k: {
        name: k[name].half() for name in ("q_extend", "k_extend", "v_extend", "k_buffer", "v_buffer")
    },
    "q stride": lambda k: {"q_extend": _strided(k["q_extend"])},
    "k stride": lambda k: {"k_extend": _strided(k["k_extend"])},
    "k_buffer stride": lambda k: {"k_buffer": _strided(k["k_buffer"])},
    "q heads": lambda k: {"q_extend": k["q_extend"].repeat(1, 2, 1), "sinks": k["sinks"].repeat(2)},
    "address": lambda k: {"v_buffer": _offset(k["v_buffer"])},
    "type": lambda k: {"q_extend": k["q_extend"].as_subclass(_Tensor)},
    "index type": lambda k: {"kv_indices": k["kv_indices"].int()},
    "indptr type": lambda k: {"qo_indptr": k["qo_indptr"].long()},
    "pool type": lambda k: {name: k[name].to(torch.float8_e5m2) for name in ("k_buffer", "v_buffer")},
    "mask type": lambda k: {"custom_mask": k["custom_mask"].to(torch.uint8)},
    "no mask": lambda k: {"custom_mask": None},
    "no sinks": lambda k: {"sinks": None},
    "sink type": lambda k: {"sinks": k["sinks"].half()},
    "no offsets": lambda k: {"window_kv_offsets": None},
    "no prefix": lambda k: {"kv_indices": k["kv_indices"][:0], "kv_indptr": torch.zeros_like(k["kv_indptr"])},
    "positions": lambda k: {"q_positions": torch.arange(k["q_extend"].shape[0], dtype=torch.int32)},
    "window": lambda k: {"sliding_window_size": 5},
    "no window": lambda k: {"sliding_window_size": 0},
    "causal": lambda k: {"is_causal": not k["is_causal"]},
    "causal as an int": lambda k: {"is_causal": int(k["is_causal"])},
    "prefix of the mask": lambda k: {"skip_prefix_custom_mask": True},
    "cap": lambda k: {"logit_cap": 3.0},
    "cap as an int": lambda k: {"logit_cap": 20},
    "sm_scale": lambda k: {"sm_scale": -0.5},
    "k_scale": lambda k: {"k_scale": 0.5},
    "v_scale": lambda k: {"v_scale": None},
    "temperature": lambda k: {"xai_temperature_len": 3},
    "LSE": lambda k: {"return_lse": True},
    "alias of the new": lambda k: {"v_extend": k["k_extend"]},
    "alias of the pool": lambda k: {"v_buffer": k["k_buffer"]},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_changes_is_checked_again(full_checks, what):
    """And its Inputs are what a process that never saw the first call would make."""
    one = case(**FULL)
    changed = OTHERS[what](one.kwargs)
    known(one)
    if changed.get("q_extend") is not None:  # the output goes with the query
        q = changed["q_extend"]
        changed["o_extend"] = torch.empty(*q.shape[:2], one.spec.dim_v, dtype=q.dtype)
    after, prepared = known(one, **changed)
    assert len(full_checks) == 2
    calls.forget()
    alone, first = known(one, **changed)
    assert prepared.problem == first.problem
    assert [type(x) for x in after] == [type(x) for x in alone]
    scalars = checks.Inputs._fields.index("batch_size")
    assert after[scalars:] == alone[scalars:]


def test_aliasing_is_seen(full_checks):
    one = case(alias=True, dim=64, dim_v=32)
    assert known(one)[1].problem.v_aliases_k_pool and known(one)[1].problem.v_aliases_k_new
    for name in ("v_buffer", "v_extend"):
        wide = _strided(one.kwargs[name])[..., : one.spec.dim_v]  # elsewhere
        problem = known(one, **{name: wide})[1].problem
        assert problem.v_aliases_k_pool == (name != "v_buffer")
        assert problem.v_aliases_k_new == (name != "v_extend")
    assert len(full_checks) == 3


def test_the_lse_is_new_in_every_call():
    one = case()
    _, first = call(one, return_lse=True)
    _, second = call(one, return_lse=True)
    assert first.data_ptr() != second.data_ptr()


def test_a_negative_zero_is_not_taken_for_zero(full_checks):
    one = case()
    for v_scale in (0.0, -0.0):
        assert math.copysign(1.0, known(one, v_scale=v_scale)[0].v_scale) == math.copysign(1.0, v_scale)


def test_nothing_bad_is_remembered(full_checks):
    one = case()
    for _ in range(2):
        with pytest.raises(ValueError, match="head_dim"):  # passes inputs.py, not Problem
            known(case(dim=8))
    assert not calls._known
    known(one)
    assert len(full_checks) == 3


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(calls, "MAX_SIGNATURES", 4)
    monkeypatch.setattr(calls, "MAX_LENGTHS", 3)
    one = case()
    for i in range(10):
        known(one, sm_scale=1.0 + i)
        assert 1 <= len(calls._known) <= 4
    for i in range(10):
        assert known(one, max_len_extend=100 + i)[1].problem.max_len_extend == 100 + i
        assert all(len(entry.prepared) <= 3 for entry in calls._known.values())


def test_threads_agree():
    """Many threads over more signatures than are kept."""
    cases = [case(seed=seed, lengths=[(1 + seed, seed)]) for seed in range(6)]
    wrong = []

    def work(turn):
        for i in range(60):
            one = cases[(i * turn) % len(cases)]
            scale = 1.0 + i % 7
            checked, prepared = known(one, sm_scale=scale)
            if checked.sm_scale != scale or prepared.problem.num_tokens != one.kwargs["q_extend"].shape[0]:
                wrong.append((turn, i))

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
