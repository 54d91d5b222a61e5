"""When ranks do not agree, or one does not come: named errors, NaN, and a communicator that can be reset."""

from __future__ import annotations

import pytest
import torch
from ranks import (
    ALGOS,
    DTYPES,
    TORCHRUN,
    Ranks,
    assert_same_bits,
    capture,
    expected_sum,
    integers,
    normals,
    poisoned_like,
    shared,
)

import extend_attn
from extend_attn.comm import CommDisagreement, CommError, CommTimeout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(TORCHRUN, reason="both sides are looked at: virtual ranks only")]

SMALL = {"max_bytes": 1 << 20, "max_push_bytes": 1 << 20, "timeout_s": 0.5}
# Both ranks come, so nothing should wait this long; the GPU may be shared with other processes.
PATIENT = {**SMALL, "timeout_s": 10.0}


@pytest.fixture
def pair(request):
    ranks = Ranks(2, **getattr(request, "param", SMALL))
    yield ranks
    ranks.wait()
    for comm in ranks.comms:
        try:
            comm.close()
        except CommError:
            pass


def assert_works(ranks):
    for algo in ALGOS:
        every = integers(ranks.world, 999, torch.float16, seed=1)
        outs = poisoned_like(every)
        ranks.wait()
        ranks.each(lambda comm, x, out: comm.all_reduce(x, out=out, algo=algo), every, outs)  # noqa: B023
        ranks.check()
        for out in outs:
            assert_same_bits(out, expected_sum(every))


def different_calls():
    """name -> (call of rank 0, call of rank 1, words that both errors hold)."""

    def reduce(count, dtype=torch.bfloat16, algo="one_shot_push"):
        def call(comm):
            x = torch.ones(1 << 16, dtype=dtype, device=comm.device)[:count]
            out = torch.full((count,), 7.0, dtype=dtype, device=comm.device)
            return lambda: comm.all_reduce(x, out=out, algo=algo), [out]

        return call

    def norm(tokens):
        def call(comm):
            q = torch.ones(tokens, 256, dtype=torch.bfloat16, device=comm.device)
            k = torch.ones(tokens, 128, dtype=torch.bfloat16, device=comm.device)
            weights = torch.ones(256, dtype=torch.bfloat16, device=comm.device)
            return lambda: extend_attn.fused_parallel_qknorm(comm, q, k, weights, weights[:128], 1e-6), [q, k]

        return call

    cases = {
        "type": (reduce(4096), reduce(4096, torch.float16), ["bfloat16", "float16"]),
        "push and pull": (reduce(4096), reduce(4096, algo="one_shot_pull"), ["one_shot_push", "one_shot_pull"]),
        "pulls": (
            reduce(4096, algo="two_shot_pull"),
            reduce(4096, algo="one_shot_pull"),
            ["two_shot_pull", "one_shot_pull"],
        ),
        "operation": (reduce(4096), norm(8), ["one_shot_push of 4096", "tp_qknorm of 8 tokens"]),
        "tokens": (norm(8), norm(9), ["8 tokens", "9 tokens"]),
    }
    for algo in ALGOS:
        cases[f"size, {algo}"] = (reduce(4096, algo=algo), reduce(40_000, algo=algo), ["4096", "40000"])
    return cases


@pytest.mark.parametrize("pair", [PATIENT], indirect=True, ids=["patient"])
@pytest.mark.parametrize("name", list(different_calls()))
def test_ranks_that_disagree_are_told(pair, name):
    """Named on both sides before the timeout, the output NaN; then nothing works until reset(), and then all does."""
    *makes, words = different_calls()[name]
    calls, outputs = zip(*(make(comm) for make, comm in zip(makes, pair.comms)))
    pair.wait()
    for call, stream in zip(calls, pair.streams):
        with torch.cuda.stream(stream):
            call()
    pair.wait()
    for comm, outs in zip(pair.comms, outputs):
        with pytest.raises(CommDisagreement) as raised:
            comm.check()
        text = str(raised.value)
        assert all(word in text for word in words), text
        assert f"rank {comm.rank}" in text and "epoch 0" in text
        for out in outs:
            assert out.isnan().all(), "the whole output is NaN"
    for comm in pair.comms:
        with pytest.raises(CommDisagreement):
            comm.all_reduce(torch.ones(8, dtype=torch.bfloat16, device=pair.device), algo="one_shot_push")
    for comm in pair.comms:
        comm.reset()
    assert_works(pair)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).replace("torch.", ""))
@pytest.mark.parametrize("algo", ALGOS)
def test_a_rank_that_does_not_come(pair, algo, dtype):
    """The other's output is NaN after the timeout, and its next call raises; the absent one has nothing to say."""
    x = torch.ones(5001, dtype=dtype, device=pair.device)
    out = torch.zeros_like(x)
    pair.wait()
    with torch.cuda.stream(pair.streams[0]):
        pair.comms[0].all_reduce(x, out=out, algo=algo)
    pair.wait()
    assert out.isnan().all()
    with pytest.raises(CommTimeout, match=f"rank 0, epoch 0, {algo} of 5001 .*: nothing from rank 1 within 0.5 s"):
        pair.comms[0].all_reduce(x, out=out, algo=algo)
    pair.comms[1].check()
    for comm in pair.comms:
        comm.reset()
    assert_works(pair)


def test_norm_of_a_rank_that_is_alone(pair):
    q = torch.ones(300, 256, dtype=torch.bfloat16, device=pair.device)
    k = torch.ones(300, 128, dtype=torch.bfloat16, device=pair.device)
    w = torch.ones(256, dtype=torch.bfloat16, device=pair.device)
    pair.wait()
    with torch.cuda.stream(pair.streams[0]):
        extend_attn.fused_parallel_qknorm(pair.comms[0], q, k, w, w[:128], 1e-6)
    pair.wait()
    assert q.isnan().all() and k.isnan().all()
    with pytest.raises(CommTimeout, match="tp_qknorm of 300 tokens"):
        pair.comms[0].check()


def test_calls_queued_behind_a_failure_leave_at_once(pair):
    """They would each wait for the timeout otherwise; their outputs are NaN too, and the first failure is reported."""
    x = torch.ones(1000, dtype=torch.bfloat16, device=pair.device)
    outs = [torch.zeros_like(x) for _ in range(100)]
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    pair.wait()
    with torch.cuda.stream(pair.streams[0]):
        start.record()
        for number, out in enumerate(outs):
            pair.comms[0].all_reduce(x, out=out, algo=ALGOS[number % 3])
        end.record()
    pair.wait()
    assert start.elapsed_time(end) < 10 * 1000 * SMALL["timeout_s"]
    assert all(out.isnan().all() for out in outs)
    with pytest.raises(CommTimeout, match="epoch 0"):
        pair.comms[0].check()


def test_replays_of_a_poisoned_communicator_are_nan(pair):
    every = integers(2, 4096, torch.bfloat16, seed=0)
    outs = poisoned_like(every)
    graphs, _ = capture(pair, lambda comm, x, out: comm.all_reduce(x, out=out, algo="one_shot_pull"), every, outs)
    pair.wait()
    pair.each(lambda comm, graph: graph.replay(), graphs)
    pair.check()
    with torch.cuda.stream(pair.streams[0]):
        pair.comms[0].all_reduce(every[0], out=outs[0], algo="one_shot_push")
    pair.wait()
    outs[0].zero_()
    pair.wait()
    with torch.cuda.stream(pair.streams[0]):
        graphs[0].replay()
    pair.wait()
    assert outs[0].isnan().all()
    with pytest.raises(CommTimeout):
        pair.comms[0].check()
    for comm in pair.comms:
        comm.reset()
    pair.each(lambda comm, graph: graph.replay(), graphs)  # graphs outlive a reset
    pair.check()
    for out in outs:
        assert_same_bits(out, expected_sum(every))


def test_replay_before_the_capture_is_left(pair):
    """A slot that nobody filled is an error, not a null read."""
    x = torch.ones(4096, dtype=torch.bfloat16, device=pair.device)
    out = torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    comm = pair.comms[0]
    with comm.capture():
        with torch.cuda.graph(graph, stream=pair.streams[0]):
            comm.all_reduce(x, out=out, algo="one_shot_pull")
        graph.replay()
        pair.wait()
    assert out.isnan().all()
    with pytest.raises(CommError, match="capture"):
        comm.check()


@pytest.mark.parametrize("pair", [PATIENT], indirect=True, ids=["patient"])
def test_captures_that_differ(pair):
    """Leaving capture() compares what was captured; the graphs of ranks that differ would never meet."""
    x = torch.ones(4096, dtype=torch.bfloat16, device=pair.device)
    out = torch.zeros_like(x)
    with pytest.raises(CommError, match="call 0 is .*4096.* on rank 0 and .*1024"):
        for comm, stream, count in zip(pair.comms, pair.streams, (4096, 1024)):
            graph = torch.cuda.CUDAGraph()
            with comm.capture(), torch.cuda.graph(graph, stream=stream):
                comm.all_reduce(x[:count], out=out[:count], algo="one_shot_pull")
    with pytest.raises(CommError, match="different numbers of calls"):
        for comm, stream, times in zip(pair.comms, pair.streams, (1, 2)):
            graph = torch.cuda.CUDAGraph()
            with comm.capture(), torch.cuda.graph(graph, stream=stream):
                for _ in range(times):
                    comm.all_reduce(x, out=out, algo="one_shot_pull")
    with pytest.raises(KeyError):
        with pair.comms[0].capture():
            raise KeyError("the engine's own error")
    with pytest.raises(CommError, match="rank 0 left it with KeyError"):
        with pair.comms[1].capture():
            pass
    assert_works(pair)


BAD = {
    "integers": (TypeError, "x: got torch.int32", lambda x: (x.to(torch.int32), {})),
    "no tensor": (TypeError, "x: got list", lambda x: ([1.0], {})),
    "a CPU tensor": (ValueError, "x: got a tensor on cpu", lambda x: (x.cpu(), {})),
    "not contiguous": (ValueError, "x: got strides", lambda x: (x.view(64, 64).t(), {})),
    "misaligned": (ValueError, "x: got address .* aligned to 16", lambda x: (x[1:], {})),
    "misaligned out": (ValueError, "out: got address", lambda x: (x[:64], {"out": torch.empty_like(x)[1:65]})),
    "overlap": (ValueError, "out: overlaps x in part", lambda x: (x[:64], {"out": x[8:72]})),
    "another type": (ValueError, "out: got torch.float16", lambda x: (x, {"out": x.to(torch.float16)})),
    "another shape": (ValueError, "out: got torch.bfloat16 \\(8,\\)", lambda x: (x, {"out": x[:8].clone()})),
    "too large": (ValueError, "x: got 4194304 bytes; .*max_push_bytes=1048576", lambda x: (x.repeat(512), {})),
    "algorithm": (ValueError, "algo: got 'ring'", lambda x: (x, {"algo": "ring"})),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_named_before_a_launch(name):
    ranks = shared_small()
    error, match, make = BAD[name]
    before = [comm._core.epoch() for comm in ranks.comms]
    for comm in ranks.comms:
        x, keywords = make(torch.ones(4096, dtype=torch.bfloat16, device=ranks.device))
        with pytest.raises(error, match=match):
            comm.all_reduce(x, **{"algo": "one_shot_push", **keywords})
    assert [comm._core.epoch() for comm in ranks.comms] == before
    assert_works(ranks)


def shared_small() -> Ranks:
    if not _small:
        _small.append(Ranks(2, **PATIENT))
    return _small[0]


_small = []


def test_bad_norms_are_named_before_a_launch():
    ranks = shared_small()
    comm = ranks.comms[0]

    def good():
        rows = torch.ones(4, 512, dtype=torch.bfloat16, device=ranks.device)
        return {
            "q": rows[:, :256],
            "k": rows[:, 256:384],
            "q_weight": torch.ones(256, dtype=torch.bfloat16, device=ranks.device),
            "k_weight": torch.ones(128, dtype=torch.bfloat16, device=ranks.device),
        }

    ones = good()
    for error, match, change in (
        (ValueError, "k: overlaps q", {"k": ones["q"][:, 128:]}),
        (TypeError, "k: got torch.float16; q is", {"k": ones["k"].to(torch.float16)}),
        (ValueError, "k: got 3 tokens; q has 4", {"k": ones["k"][:3]}),
        (ValueError, "q_weight: got shape", {"q_weight": ones["k_weight"]}),
        (ValueError, "q: got a width of 120", {"q": ones["q"][:, :120], "q_weight": ones["q_weight"][:120]}),
        (ValueError, "k: got a width of 56", {"k": ones["k"][:, :56], "k_weight": ones["k_weight"][:56]}),
        (ValueError, "q: got shape \\(4, 2, 128\\)", {"q": ones["q"].reshape(4, 2, 128)}),
        (ValueError, "q: got address", {"q": torch.ones(4, 512, dtype=torch.bfloat16, device=ranks.device)[:, 1:257]}),
        (ValueError, "a tensor on cpu", {"q_weight": ones["q_weight"].cpu()}),
    ):
        with pytest.raises(error, match=match):
            extend_attn.fused_parallel_qknorm(comm, **{**ones, **change}, eps=1e-6)
    assert comm._core.epoch() == ranks.comms[1]._core.epoch()


def test_closed():
    ranks = Ranks(2, **SMALL)
    x = torch.ones(64, dtype=torch.bfloat16, device=ranks.device)
    ranks.close()
    ranks.close()
    for comm in ranks.comms:
        for call in (lambda: comm.all_reduce(x), comm.check, comm.reset, comm.capture):  # noqa: B023
            with pytest.raises(RuntimeError, match="closed"):
                call()
        assert not comm.can_reduce(x)


def test_close_raises_what_was_never_reported():
    ranks = Ranks(2, **SMALL)
    x = torch.ones(64, dtype=torch.bfloat16, device=ranks.device)
    out = torch.zeros_like(x)
    ranks.wait()
    with torch.cuda.stream(ranks.streams[0]):
        ranks.comms[0].all_reduce(x, out=out, algo="one_shot_push")
    ranks.wait()
    with pytest.raises(CommTimeout):
        ranks.comms[0].close()
    ranks.comms[0].close()
    ranks.comms[1].close()


def test_too_large_has_nowhere_to_go_on_virtual_ranks():
    ranks = shared_small()
    x = torch.ones(1 << 20, dtype=torch.float32, device=ranks.device)
    assert not ranks.comms[0].can_reduce(x)
    with pytest.raises(ValueError, match="virtual ranks have no torch.distributed"):
        ranks.comms[0].all_reduce(x)
    assert ranks.comms[0].can_reduce(x[:1000])


def test_no_dependent_launch(monkeypatch):
    """The switch works, and results are the same without."""
    monkeypatch.setenv("EXTEND_ATTN_PDL", "0")
    ranks = Ranks(2, **PATIENT)
    assert not any(comm._core.dependent_launch for comm in ranks.comms)
    assert_works(ranks)
    ranks.close()


@pytest.mark.parametrize("algo", ALGOS)
def test_the_first_call_waits_as_later_ones_do(algo):
    """A new workspace holds no signal that could pass for one of call 0."""
    ranks = Ranks(4, **PATIENT)
    every = normals(4, 70_001, torch.float32, seed=1)
    outs = poisoned_like(every)
    for comm in ranks.comms:
        comm._core.set_jitter_ns(300_000)
    ranks.wait()
    ranks.each(lambda comm, x, out: comm.all_reduce(x, out=out, algo=algo), every, outs)
    ranks.check()
    for out in outs:
        assert_same_bits(out, expected_sum(every))
    ranks.close()


@pytest.mark.parametrize("world", [2, 8])
def test_delays_change_nothing(world):
    """Each block stalls at random, so that ranks and blocks overtake each other in all ways."""
    ranks = shared(world)
    for comm in ranks.comms:
        comm._core.set_jitter_ns(30_000)
    try:
        for number in range(60):
            count = (1, 4096, 70_001)[number % 3]
            every = normals(world, count, torch.float32, seed=number)
            outs = poisoned_like(every)
            ranks.wait()
            algo = ALGOS[number % len(ALGOS)]
            ranks.each(lambda comm, x, out: comm.all_reduce(x, out=out, algo=algo), every, outs)  # noqa: B023
            ranks.check()
            for out in outs:
                assert_same_bits(out, expected_sum(every))
    finally:
        for comm in ranks.comms:
            comm._core.set_jitter_ns(0)
