"""CUDA graphs, streams and workspaces: what an engine does around a call."""

from __future__ import annotations

import importlib
import warnings

import bars
import pytest
import torch
from cases import Case, make_case
from modes import GPU, KERNELS, Mode, modes

import extend_attn

pytestmark = pytest.mark.gpu

BIG = [(8, 900), (40, 300), (1, 2000), (8, 64)]
OTHERS = [
    [(8, 10), (3, 900), (8, 1999), (40, 1)],
    [(0, 0), (1, 5), (0, 0), (0, 0)],  # a batch padded with empty sequences
    [(40, 2000), (0, 700), (4, 0), (5, 77)],
    [(0, 0), (0, 0), (0, 0), (0, 0)],
]
RULES = {
    "plain": {},
    "tree": {"mask": "tree", "tree_positions": True, "window": 300, "cut": [0, 3, 50, 7], "mask_prefix": True},
    "rules": {"sinks": torch.float32, "logit_cap": 6.0, "temperature_len": 64, "causal": False, "window": 500},
    "fp8": {"kv_dtype": torch.float8_e4m3fn, "k_scale": 0.5, "v_scale": 2.0},
}


def _case(lengths, seed=0, **spec) -> Case:
    spec = {"dtype": torch.bfloat16, "dim": 64, "heads": (4, 2), "layout": "plain", "max_len_extend": 40, **spec}
    return make_case(lengths=lengths, device="cuda", seed=seed, **spec)


class Captured:
    """A graph of one call over tensors that are large enough for any case of the same batch size."""

    def __init__(self, case: Case, plan, room: int = 4, **kwargs):
        grown = {n: t.repeat(room, *[1] * (t.dim() - 1)) for n, t in _tensors(case) if self._grows(n)}
        self.static = {**{n: t.clone() for n, t in _tensors(case)}, **grown}
        self.out, _ = case.out()
        self.out = self.out.repeat(room, 1, 1)
        call = {**case.kwargs, **self.static, "o" if case.spec.unified else "o_extend": self.out, **kwargs}
        function = extend_attn.extend_attention_fwd_unified if case.spec.unified else extend_attn.extend_attention_fwd
        run = lambda: function(**call, plan=plan, return_lse=True)  # noqa: E731
        run()  # compiles and loads
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.lse = run()

    @staticmethod
    def _grows(name: str) -> bool:
        return name not in ("qo_indptr", "sinks")

    def load(self, case: Case) -> None:
        """Put a case's contents where the graph reads; all the rest becomes poison."""
        for name, source in _tensors(case):
            target = self.static[name]
            if target.element_size() == 1 and target.is_floating_point():
                target, source = target.view(torch.uint8), source.view(torch.uint8)
                target.fill_(0x7F)
            elif target.is_floating_point():
                target.fill_(float("nan"))
            target[: source.shape[0]].copy_(source)
        self.out.fill_(float("nan"))

    def replay(self, case: Case) -> None:
        self.load(case)
        self.graph.replay()
        self.check(case)

    def check(self, case: Case) -> None:
        rows = case.tokens
        assert torch.isnan(self.out[rows:]).all() and torch.isneginf(self.lse[rows:]).all()
        bars.assert_right(case, self.out[:rows], self.out[:rows], self.lse[:rows])


def _tensors(case: Case):
    return [(name, t) for name, t in case.kwargs.items() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("unified", [False, True], ids=["two_stage", "unified"])
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_replay_with_other_contents_and_lengths(kernel, rules, unified):
    captured = Captured(_case(BIG, unified=unified, **RULES[rules]), KERNELS[kernel])
    for seed, lengths in enumerate([BIG, *OTHERS], start=1):
        captured.replay(_case(lengths, seed, unified=unified, **RULES[rules]))


@pytest.mark.parametrize("rules", RULES)
def test_default_plan_in_a_graph(rules):
    """The plan that is chosen at capture stays right for other lengths, up to the captured bounds."""
    captured = Captured(_case(BIG, **RULES[rules]), None)
    for seed, lengths in enumerate(OTHERS, start=1):
        captured.replay(_case(lengths, seed, **RULES[rules]))


@pytest.mark.parametrize("batch", [1, 32])
def test_decode_and_verify_graphs(batch):
    """What engines capture: a few new tokens each, prefixes of any length behind a huge index array."""
    spec = {"max_len_extend": 4, "heads": (8, 4), "dim": 128}
    largest = _case([(4, 1000)] * batch, **spec)
    slots = largest.kwargs["kv_indices"]
    captured = Captured(largest.with_(kv_indices=torch.cat([slots, slots[-1:].expand(1_000_000)])), None, room=2)
    captured.replay(_case([(4, (97 * b) % 1000) for b in range(batch)], 1, **spec))
    captured.replay(_case([(1 + b % 4, 1000 - b) for b in range(batch)], 2, **spec))


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_synchronisation(kernel):
    """Every public operation passes with synchronisation made an error."""
    two = GPU[kernel].case(mask="random", window=70, cut=[1] * 8, tree_positions=True, sinks=torch.float32)
    one = GPU[kernel].case(unified=True)
    GPU[kernel].call(two, return_lse=True), GPU[kernel].call(one, return_lse=True)
    ints = lambda *v: torch.tensor(v, dtype=torch.int32, device="cuda")  # noqa: E731
    build = (ints(0, 3, 5), ints(9, 8, 7, 6, 5), ints(0, 2), ints(2, 1), ints(1, 2, 3), 2)
    extend_attn.build_unified_kv_indices(*build)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for plan in (KERNELS[kernel], None):
            GPU[kernel].call(two, return_lse=True, plan=plan)
            GPU[kernel].call(one, plan=plan)
        extend_attn.build_unified_kv_indices(*build)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_build_unified_kv_indices_in_a_graph():
    ints = lambda *v: torch.tensor(v, dtype=torch.int32, device="cuda")  # noqa: E731
    prefix, lens, starts = ints(0, 3, 5), ints(2, 1), ints(0, 2)
    slots, new = ints(9, 8, 7, 6, 5), ints(1, 2, 3)
    extend_attn.build_unified_kv_indices(prefix, slots, starts, lens, new, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indptr, merged, lengths = extend_attn.build_unified_kv_indices(prefix, slots, starts, lens, new, 2)
    prefix.copy_(ints(0, 1, 4)), lens.copy_(ints(0, 3))
    starts.copy_(ints(0, 0))
    graph.replay()
    assert indptr.tolist() == [0, 1, 7] and lengths.tolist() == [1, 3]
    assert merged[:7].tolist() == [9, 8, 7, 6, 1, 2, 3]


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("kernel", KERNELS)
def test_workspaces_may_hold_anything(kernel, fill):
    """Freed memory full of poison is what the allocator hands out next."""
    case = GPU[kernel].case()
    for size in (1 << 10, 1 << 16, 1 << 20, 1 << 24):
        held = [torch.full((size,), fill, device="cuda") for _ in range(4)]
        del held
    GPU[kernel].check(case)


def test_repeats_hold_the_same_bits():
    """Twenty calls while another stream keeps the GPU busy: no order of arrival may show."""
    for kernel in KERNELS:
        case = GPU[kernel].case()
        used = case.expected.used
        first = GPU[kernel].call(case)[0][used]
        noise = torch.randn(2048, 2048, device="cuda")
        other = torch.cuda.Stream()
        for _ in range(20):
            with torch.cuda.stream(other):
                noise = (noise @ noise).tanh()
            assert torch.equal(GPU[kernel].call(case)[0][used], first)


def test_two_streams_at_once():
    """Eager calls on two streams share no workspace."""
    mode = GPU["packed_split3"]
    cases = [mode.case(seed=seed, lengths=[(2, 3000), (1, 5000)]) for seed in (1, 2)]
    wanted = [mode.check(case) for case in cases]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = []
    torch.cuda.synchronize()
    for _ in range(50):
        for case, stream in zip(cases, streams):
            with torch.cuda.stream(stream):
                results.append(mode.call(case)[0])
    torch.cuda.synchronize()
    for i, out in enumerate(results):
        used = cases[i % 2].expected.used
        assert torch.equal(out[used], wanted[i % 2][used])


def test_two_graphs_at_once():
    """Graphs of different split counts, replayed on two streams at the same time, share no workspace."""
    cases = [_case([(4, 3000), (2, 5000)], seed, max_len_extend=4) for seed in (1, 2)]
    graphs = [Captured(case, {"family": "packed", "split_kv": splits}) for case, splits in zip(cases, (3, 7))]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for captured, case in zip(graphs, cases):
        captured.load(case)
    torch.cuda.synchronize()
    for _ in range(30):
        for captured, stream in zip(graphs, streams):
            with torch.cuda.stream(stream):
                captured.graph.replay()
    torch.cuda.synchronize()
    for captured, case in zip(graphs, cases):
        captured.check(case)


def test_a_kernel_that_is_not_loaded_is_not_captured():
    """It raises before anything is enqueued, says what to do, and a call outside the capture then loads it."""
    case = _case([(4, 100)], dim=40, logit_cap=7.5, sinks=torch.float32)  # used by no other test
    out, buffer = case.out()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="warmup"):
        with torch.cuda.graph(graph):
            extend_attn.extend_attention_fwd(o_extend=out, **case.kwargs)
    torch.cuda.synchronize()
    assert torch.isnan(buffer).all()
    Captured(case, None).replay(case)


def test_warmup_loads_what_a_capture_needs():
    case = _case([(4, 100), (4, 3000)], dim=72, temperature_len=50, window=77)  # used by no other test
    out, buffer = case.out()
    call = {"o_extend": out, **case.kwargs}
    from extend_attn.attention import prepare

    problem = prepare(**call)[1]
    report = extend_attn.warmup([problem])
    assert report.kernels >= 1 and report.seconds > 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        extend_attn.extend_attention_fwd(**call)
    graph.replay()
    bars.assert_right(case, out, buffer, None)


def test_warmup_for_a_model():
    """``Problem.for_model`` poses what a server captures: every batch size, then no capture compiles."""
    problems = extend_attn.Problem.for_model(
        head_dim=80, num_q_heads=6, num_kv_heads=2, batch_sizes=(1, 8), max_len_extend=4, max_context=4096
    )
    extend_attn.warmup(problems)
    for batch in (1, 8):
        case = _case([(4, 500)] * batch, dim=80, heads=(6, 2), max_len_extend=4, beyond=0)
        slots = case.kwargs["kv_indices"]
        case.kwargs["kv_indices"] = torch.cat([slots, slots[-1:].expand(batch * 4096 - slots.numel())])
        out, buffer = case.out()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            extend_attn.extend_attention_fwd(o_extend=out, **case.kwargs)
        graph.replay()
        bars.assert_right(case, out, buffer, None)


TOO_LARGE = {"family": "tiled", "tile": {"block_m": 64, "block_n": 128, "num_warps": 8, "num_stages": 4}}


@pytest.fixture
def trusting(monkeypatch):
    """Legality that lets everything through, so that the device itself has to refuse."""
    select = importlib.import_module("extend_attn.plan.select")
    monkeypatch.setattr(select, "illegal", lambda *args: None)
    select.forget()
    yield
    select.forget()


def _wide() -> Case:
    return _case([(130, 300)], dim=256, heads=(2, 1), max_len_extend=130)


def test_an_explicit_plan_is_never_stepped_down(trusting):
    case = _wide()
    out, buffer = case.out()
    with pytest.raises(Exception, match="(?i)out of resource|shared memory"):
        extend_attn.extend_attention_fwd(o_extend=out, **case.kwargs, plan=TOO_LARGE)
    torch.cuda.synchronize()
    assert torch.isnan(buffer).all()


def test_a_chosen_plan_steps_down_and_says_so_once(monkeypatch):
    from extend_attn import Plan, Tile, attention, calls

    plan = Plan(family="tiled", tile=Tile(**TOO_LARGE["tile"]), source="a wrong estimate")
    monkeypatch.setattr(attention, "select", lambda *args, **kwargs: plan)
    monkeypatch.setattr(attention, "_stepped_down", {})
    calls.forget()
    case, mode = _wide(), Mode("default", "cuda", {})
    with pytest.warns(UserWarning, match="using"):
        mode.check(case, plan=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mode.check(case, plan=None)
    calls.forget()


@pytest.mark.parametrize("mode", modes("tiled", "packed_split3", reference=False, interpreted=False), indirect=True)
def test_another_current_device_or_stream(mode):
    """The call goes to the current stream, whatever it is."""
    case = mode.case()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        out, buffer, lse = mode.call(case, return_lse=True)
    stream.synchronize()
    bars.assert_right(case, out, buffer, lse)


HOPPER = {
    "tma": {"family": "tiled", "pack_gqa": False, "tma": True},
    "tma_gqa": {"family": "tiled", "pack_gqa": True, "tma": True},
    "pdl": {"family": "packed", "split_kv": 3, "pdl": True},
    "pdl_tiled": {"family": "hopper_tiled", "split_kv": 1, "pdl": True},
    "pdl_tiled_split": {"family": "hopper_tiled", "split_kv": 3, "pdl": True},
    "pdl_gather": {"family": "hopper_tiled", "gather": "ahead", "split_kv": 3, "pdl": True},
    "pdl_beside": {"family": "hopper_tiled", "gather": "beside", "split_kv": 1, "pdl": True},
}


@pytest.mark.parametrize("rules", ["plain", "tree", "rules", "fp8"])
@pytest.mark.parametrize("plan", HOPPER)
def test_what_newer_gpus_add(plan, rules):
    """TMA descriptors and dependent launches: the same answers, eager and in a graph."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs sm_90 or newer")
    mode = Mode(plan, "cuda", HOPPER[plan])
    mode.check(mode.case(**{**RULES[rules], **({"cut": [0, 3, 50, 7, 0, 0, 9, 1]} if rules == "tree" else {})}))
    captured = Captured(_case(BIG, **RULES[rules]), HOPPER[plan])
    for seed, lengths in enumerate(OTHERS, start=1):
        captured.replay(_case(lengths, seed, **RULES[rules]))
