"""Bound launches on a GPU: a repeated call goes past Triton's dispatch and still gets its own answer."""

from __future__ import annotations

import random
import threading

import bars
import pytest
import torch
from cases import make_case

import extend_attn
from extend_attn import attention, calls
from extend_attn.plan import Plan, Tile

pytestmark = pytest.mark.gpu

SMALL = [(4, 70), (2, 300), (3, 0)]
LONG = [(40, 90), (130, 0), (7, 300)]
FORCED = {
    "packed": Plan("packed", Tile(16, 32, 4, 2)),
    "packed_split": Plan("packed", Tile(16, 32, 4, 2), split_kv=3, pdl=True),
    "tiled": Plan("tiled", Tile(64, 32, 4, 2)),
    "tiled_tma": Plan("tiled", Tile(64, 32, 4, 2), tma=True, pack_gqa=True),
}
RULES = {
    "plain": {},
    "window": {"window": 50, "cut": [0, 3, 5]},
    "tree": {"mask": "tree", "tree_positions": True, "window": 60, "mask_prefix": True},
    "rules": {"sinks": torch.float32, "logit_cap": 6.0, "temperature_len": 64, "causal": False},
    "fp8": {"kv_dtype": torch.float8_e4m3fn, "k_scale": 0.5, "v_scale": 2.0},
    "fp8_e5m2": {"kv_dtype": torch.float8_e5m2},
    "mla": {"heads": (4, 1), "dim": 96, "dim_v": 64, "alias": True},
    "qkv": {"layout": "qkv", "pool_layout": "strided"},
    "one_head": {"heads": (1, 1)},
    "int32": {"index_dtype": torch.int32, "indptr_dtype": torch.int64},
}


@pytest.fixture(autouse=True)
def nothing_remembered():
    calls.forget()
    yield
    calls.forget()


@pytest.fixture
def dispatches(monkeypatch):
    """The launches that went through Triton's own dispatch."""
    launching = attention._launching()
    seen = []
    launch = launching.launch

    def watched(*arguments):
        seen.append(arguments)
        return launch(*arguments)

    monkeypatch.setattr(launching, "launch", watched)
    return seen


def case(lengths=SMALL, **spec):
    usual = {"device": "cuda", "dtype": torch.bfloat16, "dim": 64, "layout": "plain"}
    return make_case(**{"lengths": lengths, **usual, **spec})


def right(one, **kwargs):
    """Calls, and holds the result to the contract's bars."""
    out, buffer = one.out()
    unified = one.spec.unified
    function = extend_attn.extend_attention_fwd_unified if unified else extend_attn.extend_attention_fwd
    lse = function(**{"o" if unified else "o_extend": out}, **one.kwargs, **kwargs)
    bars.assert_right(one, out, buffer, lse)
    return out.clone(), lse


def forced(monkeypatch, plan):
    monkeypatch.setattr(attention, "_plan", lambda *arguments: plan)


@pytest.mark.parametrize("lse", [False, True], ids=["", "lse"])
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("unified", [False, True], ids=["two_stage", "unified"])
@pytest.mark.parametrize("plan", FORCED)
def test_repeats_do_not_dispatch(plan, unified, rules, lse, dispatches, monkeypatch):
    if unified and plan == "tiled_tma":
        pytest.skip("a unified call has no contiguous keys to load through TMA")
    forced(monkeypatch, FORCED[plan])
    one = case(LONG if plan.startswith("tiled") else SMALL, unified=unified, **RULES[rules])
    first = right(one, return_lse=lse)
    assert len(dispatches) == 1
    for _ in range(3):
        again = right(one, return_lse=lse)
        assert torch.equal(first[0].nan_to_num(), again[0].nan_to_num())
        assert not lse or torch.equal(first[1], again[1])
    assert len(dispatches) == 1


@pytest.mark.parametrize("lengths", [[], [(0, 70), (0, 0)]], ids=str)
@pytest.mark.parametrize("plan", FORCED)
def test_repeats_of_an_empty_batch(plan, lengths, monkeypatch):
    """Nothing is launched, and no descriptor is made of tensors without rows; calls with rows go on."""
    forced(monkeypatch, FORCED[plan])
    for one in (case(lengths), case(lengths), case(LONG), case(LONG), case(lengths), case(LONG)):
        right(one)


@pytest.mark.parametrize("plan", FORCED)
def test_repeats_with_a_named_plan_do_not_dispatch(plan, dispatches):
    """Each plan has kernels of its own, bound; and so has the default beside it."""
    one = case(LONG if plan.startswith("tiled") else SMALL)
    asked = ({"plan": FORCED[plan]}, {"plan": FORCED[plan].to_json()}, {"plan": "sglang", "tile": (32, 32, 4, 1)}, {})
    for _ in range(4):
        for named in asked:
            right(one, return_lse=True, **named)
    assert {chosen for chosen, *_ in dispatches} >= {FORCED[plan]}
    assert len(dispatches) <= len(asked)  # a dict and a Plan that say the same share their kernels


@pytest.mark.parametrize("plan", FORCED)
def test_other_lengths_do_not_dispatch_either(plan, dispatches, monkeypatch):
    """Nor do other addresses; each gets its own grid."""
    forced(monkeypatch, FORCED[plan])
    right(case([(8, 100), (40, 3)]))
    for seed, lengths in enumerate([[(40, 3), (8, 100)], [(1, 1), (2, 900)], [(3, 40), (0, 0), (100, 7), (5, 5)]]):
        right(case(lengths, seed=seed, max_len_extend=128))
        right(case(lengths, seed=seed + 10))
    assert len(dispatches) == 1


def _moved(tensor, elements):
    """The same values at an address that is moved by so many elements."""
    moved = torch.empty(tensor.numel() + 64, dtype=tensor.dtype, device=tensor.device)
    moved = moved[elements : elements + tensor.numel()].view(tensor.shape)
    return moved.copy_(tensor)


@pytest.mark.parametrize("plan", ["packed", "packed_split", "tiled"])
@pytest.mark.parametrize(
    "name", ["q_extend", "k_extend", "v_extend", "k_buffer", "v_buffer", "qo_indptr", "kv_indptr", "kv_indices"]
)
def test_alignment_of_each_tensor(name, plan, monkeypatch):
    """An address that is not a multiple of 16 bytes, right after one that is, and back."""
    forced(monkeypatch, FORCED[plan])
    one = case(LONG if plan == "tiled" else SMALL)
    for _ in range(2):
        for elements in (0, 1, 8, 4, 16):
            right(one.with_(**{name: _moved(one.kwargs[name], elements)}))


ANY = [
    *(dict(RULES[name]) for name in ("plain", "window", "tree", "fp8", "qkv", "int32")),
    {"unified": True},
    {"dtype": torch.float16},
    {"layout": "odd"},
]


def test_calls_of_any_kind_in_any_order():
    """Types, strides, alignments, rules and lengths drawn at random, many times each: every answer is its own."""
    pick = random.Random(0)
    lengths = [[(1, 5)], [(4, 70), (2, 300), (3, 0)], [(1, 30)] * 5, [(8, 16), (0, 0), (3, 100)]]
    made = [case(chosen, seed=i, **kind) for i, kind in enumerate(ANY) for chosen in lengths]
    for one in pick.choices(made, k=4 * len(made)):
        if pick.random() < 0.2:
            one = one.with_(k_buffer=_moved(one.kwargs["k_buffer"], pick.choice([1, 8])))
        right(one)


def test_hooks_see_every_launch(dispatches):
    from extend_attn.kernels import launchers

    one = case()
    right(one), right(one)
    assert len(dispatches) == 1
    seen = []
    hook = lambda metadata: seen.append(metadata)  # noqa: E731
    chain = launchers._HOOKS.launch_enter_hook
    if hasattr(chain, "add"):
        chain.add(hook)
        remove = lambda: chain.remove(hook)  # noqa: E731
    else:
        launchers._HOOKS.launch_enter_hook = hook
        remove = lambda: setattr(launchers._HOOKS, "launch_enter_hook", None)  # noqa: E731
    try:
        right(one)
    finally:
        remove()
    assert seen and len(dispatches) == 2
    before = len(seen)
    right(one)
    assert len(seen) == before and len(dispatches) == 2


def test_streams_and_threads_have_workspaces_of_their_own(monkeypatch):
    """Split calls on several streams and from several threads at once."""
    forced(monkeypatch, FORCED["packed_split"])
    cases = [case([(2, 900 + 50 * i), (1, 2000)], seed=i) for i in range(4)]
    expected = [right(one)[0] for one in cases]
    wrong = []

    def work(i, stream):
        with torch.cuda.stream(stream):
            for _ in range(50):
                out, _ = cases[i].out()
                extend_attn.extend_attention_fwd(o_extend=out, **cases[i].kwargs)
                if not torch.equal(out.nan_to_num(), expected[i].nan_to_num()):  # rows that nobody owns stay NaN
                    wrong.append(i)

    torch.cuda.synchronize()
    shared = torch.cuda.Stream()
    for streams in ([torch.cuda.Stream() for _ in cases], [shared] * len(cases)):
        threads = [threading.Thread(target=work, args=(i, stream)) for i, stream in enumerate(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_graph_has_its_own_workspace(monkeypatch):
    """Two graphs of split calls replayed side by side, with eager calls between."""
    forced(monkeypatch, FORCED["packed_split"])
    cases = [case([(2, 2000), (1, 900)], seed=i) for i in range(2)]
    expected = [right(one)[0] for one in cases]
    right(cases[0])
    graphs, outs = [], []
    for one in cases:
        out, _ = one.out()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            extend_attn.extend_attention_fwd(o_extend=out, **one.kwargs)
        graphs.append(graph)
        outs.append(out)
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(20):
        for out in outs:
            out.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams):
            with torch.cuda.stream(stream):
                graph.replay()
        right(cases[0])
        torch.cuda.synchronize()
        assert all(torch.equal(out.nan_to_num(), wanted.nan_to_num()) for out, wanted in zip(outs, expected))


def test_no_synchronisation_in_a_bound_call(monkeypatch):
    forced(monkeypatch, FORCED["packed_split"])
    one = case()
    out = one.out()[0]
    for _ in range(2):
        extend_attn.extend_attention_fwd(o_extend=out, **one.kwargs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        extend_attn.extend_attention_fwd(o_extend=out, **one.kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
