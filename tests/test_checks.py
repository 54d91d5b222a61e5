"""``check=True``: the contents of index arrays, verified before anything reads through them."""

from __future__ import annotations

import pytest
import torch
from modes import modes

import extend_attn

SPEC = {"lengths": [(9, 20), (0, 4), (4, 11)], "mask": "random", "mask_prefix": True, "window": 9, "cut": [0, 1, 5]}


def _case(mode, **spec):
    return mode.case(**{**SPEC, "tree_positions": True, **spec})


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
@pytest.mark.parametrize("unified", [False, True], ids=["two_stage", "unified"])
@pytest.mark.parametrize("lead", [0, 2])
def test_a_good_call_passes(mode, unified, lead):
    """Garbage beyond what is used is not looked at."""
    case = _case(mode, unified=unified, lead=lead)
    case.kwargs["kv_indices"][-3:] = 10**6
    mode.check(case, check=True)


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
@pytest.mark.parametrize("rules", [{}, {"mask": "tree"}, {"lengths": []}, {"lengths": [(3, 0)], "beyond": 0}], ids=str)
def test_good_calls_without_most_arrays(mode, rules):
    mode.check(mode.case(**{"lengths": [(3, 9)], **rules}), check=True)


def _set(name, index, value):
    def change(kwargs):
        kwargs[name] = kwargs[name].clone()
        kwargs[name][index] = value

    return change


def _replace(name, make):
    def change(kwargs):
        kwargs[name] = make(kwargs[name])

    return change


# (change, the argument to be named, text of the bad value or index that the message must hold)
BAD = {
    "slot past the pool": (_set("kv_indices", 7, 10**6), "kv_indices", ["7", "1000000"]),
    "negative slot": (_set("kv_indices", 30, -2), "kv_indices", ["30", "-2"]),
    "two bad slots": (
        lambda k: (_set("kv_indices", 12, 10**6)(k), _set("kv_indices", 5, -9)(k)),
        "kv_indices",
        ["5", "-9"],
    ),
    "slots past the list": (_replace("kv_indices", lambda t: t[:10]), "kv_indptr", ["10"]),
    "rows past q": (_set("qo_indptr", 3, 500), "qo_indptr", ["3", "500"]),
    "negative row": (_set("qo_indptr", 0, -1), "qo_indptr", ["0", "-1"]),
    "rows go back": (_set("qo_indptr", 2, 3), "qo_indptr", []),
    "slots go back": (_set("kv_indptr", 2, 3), "kv_indptr", []),
    "negative slot pointer": (_set("kv_indptr", 0, -4), "kv_indptr", ["-4"]),
    "longer than max_len_extend": (lambda k: k.update(max_len_extend=8), "max_len_extend", ["9", "8"]),
    "mask too short": (_replace("custom_mask", lambda t: t[:40]), "custom_mask", ["40"]),
    "mask pointer past the mask": (_set("mask_indptr", 2, 10**7), "custom_mask|mask_indptr", ["10000000"]),
    "negative mask pointer": (_set("mask_indptr", 0, -8), "mask_indptr", ["-8"]),
    "positions too short": (_replace("q_positions", lambda t: t[:6]), "q_positions", ["6"]),
}
BAD_TWO_STAGE = {"negative offset": (_set("window_kv_offsets", 2, -3), "window_kv_offsets", ["2", "-3"])}
BAD_UNIFIED = {
    "negative offset": (_set("window_start_pos", 2, -3), "window_start_pos", ["2", "-3"]),
    "prefix longer than its keys": (_set("prefix_lens", 2, 90), "prefix_lens", ["2", "90"]),
    "negative prefix": (_set("prefix_lens", 0, -1), "prefix_lens", ["0", "-1"]),
}


def _all_bad():
    for unified, table in ((False, {**BAD, **BAD_TWO_STAGE}), (True, {**BAD, **BAD_UNIFIED})):
        for what, row in table.items():
            yield pytest.param(unified, *row, id=f"{'unified' if unified else 'two_stage'}-{what}".replace(" ", "_"))


@pytest.mark.parametrize("mode", modes("packed"), indirect=True)
@pytest.mark.parametrize("unified, change, argument, says", list(_all_bad()))
def test_a_bad_element_is_named(mode, unified, change, argument, says):
    case = _case(mode, unified=unified)
    change(case.kwargs)
    out, buffer = case.out()
    function = extend_attn.extend_attention_fwd_unified if unified else extend_attn.extend_attention_fwd
    plan = {"plan": mode.plan} if mode.kernel else {}
    with pytest.raises(ValueError) as caught:
        function(**{"o" if unified else "o_extend": out}, **case.kwargs, check=True, **plan)
    message = str(caught.value)
    assert message.startswith(tuple(argument.split("|"))), message
    for text in says:
        assert text in message, message
    assert torch.isnan(buffer).all(), "something was written"


@pytest.mark.parametrize("mode", modes("packed"), indirect=True)
@pytest.mark.parametrize("array", ["k_extend", "v_extend"])
def test_too_few_rows(mode, array):
    """k and v may be longer than q, not shorter than what is used."""
    case = _case(mode, beyond=0, layout="plain")
    case.kwargs[array] = case.kwargs[array][:10]
    with pytest.raises(ValueError, match="10"):
        mode.call(case, check=True)


@pytest.mark.gpu
def test_under_capture_the_error_is_read_later():
    """A replay with a bad slot writes nothing and faults nothing; ``last_error()`` names it afterwards."""
    from modes import GPU

    mode = GPU["packed"]
    case = _case(mode)
    mode.call(case, check=True)  # compiles
    out, buffer = case.out()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        extend_attn.extend_attention_fwd(o_extend=out, **case.kwargs, check=True, plan=mode.plan)
    graph.replay()
    assert extend_attn.last_error() is None
    used = case.expected.used
    torch.testing.assert_close(out[used].double(), case.expected.out[used], atol=5e-2, rtol=0)
    buffer.fill_(float("nan"))
    good = case.kwargs["kv_indices"][7].clone()
    case.kwargs["kv_indices"][7] = 10**9
    graph.replay()
    message = extend_attn.last_error()
    assert message is not None and message.startswith("kv_indices") and "1000000000" in message
    assert torch.isnan(buffer).all()
    case.kwargs["kv_indices"][7] = good
    graph.replay()
    torch.testing.assert_close(out[used].double(), case.expected.out[used], atol=5e-2, rtol=0)
