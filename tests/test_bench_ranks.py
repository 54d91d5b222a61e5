"""The collective benches without a GPU: ranks under gloo, what hangs or is wrong, the decoder step."""

from __future__ import annotations

import contextlib
import math
import time

import pytest
import torch

from extend_attn.bench import main, results
from extend_attn.bench.collectives import all_reduce, capturing, clock, tasks
from extend_attn.bench.collectives.arithmetic import sizes_named
from extend_attn.bench.collectives.decoder import Batch, Decoder, lockstep
from extend_attn.bench.collectives.providers import Providers
from extend_attn.bench.collectives.ranks import Member, Ranks
from extend_attn.bench.collectives.run import Run, Settings
from extend_attn.bench.collectives.shapes import MODELS
from extend_attn.bench.collectives.step import StepBench
from extend_attn.bench.collectives.team import Team, merged
from extend_attn.bench.providers.base import OWN, Skip
from extend_attn.comm.policy import ENVIRONMENT, Policy

CPU = torch.device("cpu")


# -- ranks


def test_answers_of_ranks_become_one():
    fast, slow = {"us": {"eager": 3.0, "graph": 2.0}, "error": 0.0}, {"us": {"eager": 4.0}, "error": 0.5}
    assert merged([fast, slow]) == {"us": {"eager": 4.0}, "error": 0.5}
    assert merged([{**fast, "wrong": "x"}, slow])["wrong"] == merged([slow, {**fast, "wrong": "x"}])["wrong"] == "x"
    assert merged([{"skipped": "no GPU"}, {"skipped": "no GPU"}]) == {"skipped": "rank 0: no GPU"}
    # the rank that failed is named, not those that waited for it in vain
    hung, cause = {"failed": "no answer within 3 s; killed"}, {"failed": "ValueError: x"}
    assert merged([hung, cause, fast]) == {"failed": "rank 1: ValueError: x"}


def test_a_run_of_two_processes(tmp_path, capsys):
    """From the command line to a valid file: gloo is checked and timed, the rest is skipped with its reason."""
    out = tmp_path / "run.json"
    words = ["collectives", "--device", "cpu", "--ranks", "2", "--sizes", "4KiB", "--out", str(out)]
    assert main(words) == 0
    for kind in tasks.KINDS:
        data = results.load(str(tmp_path / f"run-{kind}.json"))
        assert data["kind"] == kind and data["ceilings"]["link"] == "cpu"
        measured = {(one["provider"], one["algo"]) for one in data["results"]}
        assert (
            measured
            == {
                "all_reduce": {("gloo", "gloo")},
                "qknorm": {("gloo", "two_all_reduces"), ("gloo", "all_gather")},
                "step": {("gloo", "gloo"), ("none", "none")},
                "capture": set(),
            }[kind]
        )
        for one in data["results"]:
            assert one["us"] > 0 and one["world"] == 2 and one["mode"] == "eager"
        assert all("GPU" in one["reason"] for one in data["skipped"])
    capsys.readouterr()


def test_a_rank_that_hangs_is_killed_with_its_peers_and_the_next_task_runs():
    started = time.monotonic()
    with Team(2, virtual=False, device="cpu", limit_s=60.0) as team:
        assert team.ask({"op": "hello"})["type"] == "cpu"
        children = [worker._child for worker in team._workers]
        assert "within 0.5 s" in team.ask({"op": "hang", "seconds": 600}, 0.5)["failed"]
        assert all(child.poll() is not None for child in children)
        assert team.ask({"op": "setup", "largest": 4096, "dtypes": ["bfloat16"]})["link"] == "cpu"
        wrong = team.ask({"op": "all_reduce", "bytes": 64, "dtype": "nonsense", "provider": "gloo", "algo": "gloo"})
        assert "nonsense" in wrong["failed"] and team._workers == []
    assert time.monotonic() - started < 200


def settings(tmp_path, **changes):
    common = dict(world=2, virtual=False, device="cpu", dtype="bfloat16", timeout_s=1.0, budget_s=None, table=None)
    return Settings(**{**common, "out": str(tmp_path / "run.json"), **changes})


class Answers:
    """A team that answers by what it is asked, and counts."""

    def __init__(self, *answers) -> None:
        self.answers, self.asked, self.environment, self.stops = dict(answers), [], {}, 0

    def ask(self, task, limit_s=None):
        self.asked.append(task["op"])
        return dict(self.answers[task["op"]])

    def stop(self):
        self.stops += 1


HELLO = ("hello", {"device": "NVIDIA H100", "versions": {"torch": "2.11.0"}})
SETUP = ("setup", {"link": "nvlink", "arch": "sm_90"})
CEILINGS = ("ceilings", {"link_gbps": 478.1})


def test_what_fails_again_and_again_is_given_up(tmp_path):
    run = Run(settings(tmp_path), "bench all-reduce")
    run.team = Answers(HELLO, SETUP, CEILINGS, ("all_reduce", {"failed": "no answer within 1 s; killed"}))
    work = tasks.chosen(tasks.all_reduce([4096 << i for i in range(5)], "bfloat16"), "nccl", None)
    files = run.everything({"all_reduce": [{"dtype": "bfloat16", **task} for task in work]})
    assert run.team.asked.count("all_reduce") == 2 and run.team.asked.count("setup") == 2 and run.failed
    reasons = [one["reason"] for one in files["all_reduce"]["skipped"]]
    assert len(reasons) == 5 and reasons[2:] == ["it failed 2 times before"] * 3
    assert results.load(str(tmp_path / "run.json"))["skipped"] == files["all_reduce"]["skipped"]


def test_ranks_that_cannot_start_leave_no_file(tmp_path):
    run = Run(settings(tmp_path), "bench all-reduce")
    run.team = Answers(("hello", {"failed": "the worker died: no GPU"}))
    assert run.everything({"qknorm": tasks.qknorm([1])}) == {} and run.failed


def test_auto_follows_the_thresholds_of_its_own_run(tmp_path):
    table = str(tmp_path / "policy.json")
    run = Run(settings(tmp_path, table=table, device="cuda"), "bench all-reduce")
    run.team = Answers(HELLO, SETUP, CEILINGS, ("all_reduce", {"us": {"eager": 5.0, "graph": 4.0}, "error": 0.0}))
    work = tasks.chosen(tasks.all_reduce([4096], "bfloat16"), OWN, "one_shot_pull,auto")
    files = run.everything({"all_reduce": [{"dtype": "bfloat16", **task} for task in work]})
    assert run.team.environment == {ENVIRONMENT: table} and run.team.stops == 1
    assert run.team.asked == ["hello", "setup", "ceilings", "all_reduce", "hello", "setup", "all_reduce"]
    assert Policy.load(table).choose(nbytes=4096, world_size=2, arch="sm_90", link="nvlink", mode="graph") == (
        "one_shot_pull",
        "table:policy.json#1",
    )
    assert len(files["all_reduce"]["results"]) == 4 and not run.failed


def test_a_wrong_result_is_a_line_without_a_time(tmp_path):
    run = Run(settings(tmp_path), "bench all-reduce")
    answer = {"us": {"eager": 5.0}, "error": float("inf"), "wrong": "wrong result of a replay"}
    (one,) = run.lines_of({"dtype": "bfloat16", **tasks.all_reduce([4096], "bfloat16")[0]}, answer)
    assert one["us"] is None and one["busbw_gbps"] is None and one["error"] is None and one["mode"] == "eager"


# -- measurements, on virtual ranks of a CPU with a communicator of this test's


class Sums:
    """One rank's communicator: a call's sum is written when the last rank has come to that call."""

    def __init__(self, queues, rank: int, off_by: float = 0.0) -> None:
        self.queues, self.rank, self.off_by = queues, rank, off_by
        self.handle_exchanges = 0

    def all_reduce(self, x, *, out=None, algo="auto"):
        out = torch.empty_like(x) if out is None else out
        if FakeGraph.capturing is None:
            self.call(x, out)
        else:
            FakeGraph.capturing.calls.append(lambda: self.call(x, out))
        return out

    def call(self, x, out):
        self.queues[self.rank].append((x, out))
        while all(self.queues):
            calls = [queue.pop(0) for queue in self.queues]
            total = sum(one.float() for one, _ in calls) + self.off_by
            for _, into in calls:
                into.copy_(total)

    @contextlib.contextmanager
    def capture(self):
        yield
        self.handle_exchanges += 1

    def check(self):
        pass


class FakeGraph:
    """What a CPU has for a CUDA graph in these tests: the communicator's calls, made again by a replay."""

    capturing = None
    stale = False  # a replay that does nothing

    def __init__(self) -> None:
        self.calls = []

    def replay(self):
        for call in [] if FakeGraph.stale else self.calls:
            call()

    def pool(self):
        return 0

    @staticmethod
    @contextlib.contextmanager
    def capture(graph, stream=None, pool=None):
        FakeGraph.capturing = graph
        try:
            yield
        finally:
            FakeGraph.capturing = None


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    """The benches' GPU side, with graphs and clocks of these tests."""
    monkeypatch.setattr(Ranks, "on_gpu", True)
    monkeypatch.setattr(Ranks, "synchronize", lambda self: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", FakeGraph.capture)
    monkeypatch.setattr(FakeGraph, "stale", False)

    def slowest(ranks, work, spans):
        for _ in range(spans):
            work()
        return 100.0

    monkeypatch.setattr(clock, "_slowest", slowest)


def virtual(off_by: float = 0.0) -> Ranks:
    queues = [[], []]
    return Ranks(2, [Member(rank, CPU, comm=Sums(queues, rank, off_by)) for rank in range(2)], virtual=True)


TASK = {"op": "all_reduce", "bytes": 4098, "dtype": "bfloat16", "provider": OWN, "algo": "auto"}


def test_a_right_sum_is_timed_and_a_wrong_one_is_not():
    ranks = virtual()
    answer = all_reduce.measure(ranks, Providers(ranks, 4098), TASK)
    assert answer["error"] == 0 and answer["us"]["eager"] > 0 and "wrong" not in answer
    ranks = virtual(off_by=1.0)
    answer = all_reduce.measure(ranks, Providers(ranks, 4098), TASK)
    assert answer["us"] == {} and "wrong result of an eager call" in answer["wrong"]


def test_replays_are_timed_by_the_call_and_checked(graphs_on_cpu):
    ranks = virtual()
    answer = all_reduce.measure(ranks, Providers(ranks, 4098), TASK)
    assert answer == {"us": {"eager": 2.0, "graph": 2.0}, "error": 0.0}  # 50 calls in 100 us
    FakeGraph.stale = True
    answer = all_reduce.measure(ranks, Providers(ranks, 4098), TASK)
    assert "wrong result of a replay" in answer["wrong"] and answer["error"] == math.inf


def test_captures_are_timed_whole_and_checked(graphs_on_cpu):
    ranks = virtual()
    for task in tasks.capture([3]):
        if task["provider"] in (OWN, "none"):
            answer = capturing.measure(ranks, Providers(ranks, task["bytes"]), {"dtype": "bfloat16", **task})
            assert answer["us"]["graph"] > 0 and answer["error"] == 0 and "wrong" not in answer
            assert answer.get("exchanges") == (1 if task["provider"] == OWN else None)
    FakeGraph.stale = True
    task = {"dtype": "bfloat16", **tasks.capture([1])[2]}
    answer = capturing.measure(ranks, Providers(ranks, task["bytes"]), task)
    assert answer["us"] == {} and "wrong result of a replay" in answer["wrong"]


def test_virtual_ranks_have_no_nccl():
    ranks = virtual()
    with pytest.raises(Skip):
        all_reduce.measure(ranks, Providers(ranks, 4096), {**TASK, "provider": "nccl", "algo": "nccl"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_inputs_have_exact_sums_that_differ_by_rank_and_seed(dtype):
    inputs = [all_reduce.input_of(rank, 5000, dtype, CPU, seed=3) for rank in range(8)]
    total = sum(one.double() for one in inputs)
    assert torch.equal(all_reduce.expected(8, 5000, dtype, CPU, seed=3).double(), total)
    assert not torch.equal(inputs[0], inputs[1]) and total.abs().max() > 0
    assert not torch.equal(inputs[0], all_reduce.input_of(0, 5000, dtype, CPU, seed=4))


def test_counts_are_equal_on_all_ranks_and_bounded():
    for nbytes in sizes_named(None):
        counts = clock.counts_for(nbytes, on_gpu=True)
        assert counts == clock.counts_for(nbytes, on_gpu=True)
        assert 50 <= counts.calls * counts.spans <= 1500


def decoders(world: int, batch: Batch):
    model = MODELS["tiny"]
    made = [Decoder(model, rank, world, batch.slots, CPU) for rank in range(world)]
    for one in made:
        one.use(batch)
    return model, made


def test_a_step_asks_for_three_sums_a_layer_and_ranks_agree():
    batch = Batch(batch=3, tokens=2, prefix=5)
    model, made = decoders(2, batch)
    rounds = []

    def reduce(partials):
        rounds.append(partials[0].shape)
        total = sum(one.float() for one in partials).to(partials[0].dtype)
        return [total.clone() for _ in partials]

    outs = lockstep([one.step() for one in made], reduce)
    assert len(rounds) == model.all_reduces == 6 and set(rounds) == {(6, model.hidden)}
    assert torch.equal(outs[0], outs[1]) and outs[0].isfinite().all()
    assert not torch.equal(outs[0], made[0].x)


def test_experts_are_those_of_each_row():
    """The sorted, grouped way against one row at a time."""
    batch = Batch(batch=4, tokens=1, prefix=3)
    model, (decoder, _) = decoders(2, batch)
    layer, x = decoder.layers[0], decoder.x
    got = decoder._experts(layer, x, x)
    normed = torch.nn.functional.rms_norm(x, (model.hidden,), None, 1e-6)
    scores, chosen = torch.topk(normed @ layer.router, model.experts_per_token)
    for row in range(4):
        want = torch.zeros(model.hidden)
        for share, expert in zip(torch.softmax(scores[row].float(), -1), chosen[row]):
            gate, up = (x[row].float() @ layer.expert_gate_up[expert].float()).chunk(2)
            inner = torch.nn.functional.gelu(gate, approximate="tanh") * up
            want += share * (inner @ layer.expert_down[expert].float())
        assert torch.allclose(got[row].float(), want, atol=0.03 * float(want.abs().max()))


def test_a_wrong_step_is_not_timed(monkeypatch):
    monkeypatch.setattr(clock, "eager_us", lambda *_: 1.0)
    task = tasks.step("tiny", [2], [1], 4)[-1]  # without communication: timed, not judged
    ranks = Ranks(2, [Member(0, CPU)], virtual=True)
    ranks.members.append(Member(1, CPU))
    bench = StepBench(ranks, Providers(ranks, 4096))
    assert bench.measure(task)["us"] == {"eager": 1.0}
    lost = {**task, "provider": OWN, "algo": "auto"}
    for member in ranks.members:
        member.comm = type("Lost", (), {"all_reduce": lambda self, x, algo: x, "check": lambda self: None})()
    answer = bench.measure(lost)
    assert answer["us"] == {} and "wrong result" in answer["wrong"]
