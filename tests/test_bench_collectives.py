"""The collective benches without a GPU: arithmetic, policy rows, ranks under gloo, what is wrong or hangs."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from extend_attn.bench import main, results
from extend_attn.bench.collectives import all_reduce, clock, tasks
from extend_attn.bench.collectives.arithmetic import LARGEST, PUBLISHED_US, SMALLEST, bus_bandwidth, sizes_named
from extend_attn.bench.collectives.decoder import Batch, Decoder, lockstep
from extend_attn.bench.collectives.providers import Providers
from extend_attn.bench.collectives.ranks import Member, Ranks
from extend_attn.bench.collectives.report import report
from extend_attn.bench.collectives.shapes import MODELS
from extend_attn.bench.collectives.step import StepBench
from extend_attn.bench.collectives.table_rows import describe, merge, rows_of, thresholds
from extend_attn.bench.collectives.team import Team, merged
from extend_attn.bench.providers.base import OWN, Skip
from extend_attn.comm.policy import MODES, Policy, Threshold

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CPU = torch.device("cpu")
KIB, MIB = 1 << 10, 1 << 20


# -- arithmetic


def test_bus_bandwidth_is_that_of_nccl_tests():
    assert bus_bandwidth(1_000_000, 2, 10.0) == pytest.approx(100.0)  # 1 MB in 10 us, as much as each rank sends
    assert bus_bandwidth(1_000_000, 8, 10.0) == pytest.approx(175.0)


def test_sizes():
    assert sizes_named(None) == [SMALLEST << i for i in range(15)] and sizes_named(None)[-1] == LARGEST
    assert sizes_named("5632, 4KiB..16KiB") == [4096, 5632, 8192, 16384]
    assert set(PUBLISHED_US) <= set(sizes_named(None))
    for text in ("", "0", "8KiB..4KiB", "much"):
        with pytest.raises(ValueError):
            sizes_named(text) if text else sizes_named("x")


def test_the_model_is_the_published_one():
    """Its weights, counted, with an embedding of 262144 words, are the 25.2 B of the model's card."""
    m = MODELS["gemma-4-26b-a4b"]
    expert_layers = 3 * m.hidden * (m.experts * m.expert_width + m.dense_width) * m.layers
    full = sum(m.is_full(i) for i in range(m.layers))
    windowed = m.hidden * m.head_dim * (2 * m.heads + 2 * m.kv_heads)
    whole = m.hidden * m.full_head_dim * (2 * m.heads + m.full_kv_heads)  # values are keys
    total = expert_layers + (m.layers - full) * windowed + full * whole + 262144 * m.hidden
    assert full == 5 and total / 1e9 == pytest.approx(25.2, abs=0.05)
    assert m.all_reduces == 90 and m.message_bytes(32) == 32 * 5632


# -- policy rows


def us(**at):
    """One size's times by algorithm."""
    short = {"push": "one_shot_push", "pull": "one_shot_pull", "two": "two_shot_pull", "nccl": "nccl"}
    return {short[name]: time for name, time in at.items()}


def test_borders_lie_between_the_sizes_that_were_measured():
    found = thresholds({4096: us(push=3, pull=5), 16384: us(push=9, pull=6), MIB: us(pull=20, nccl=12)})
    assert found == (Threshold(8192, "one_shot_push"), Threshold(131072, "one_shot_pull"), Threshold(None, "nccl"))


def test_noise_makes_no_border():
    times = {4096 << i: us(push=10 + 0.1 * (i % 2), pull=10 + 0.1 * (1 - i % 2)) for i in range(8)}
    found = thresholds(times)
    assert len({one.algo for one in found if one.algo != "nccl"}) == 1


def test_nccl_wins_by_more_than_the_margin_or_not_at_all():
    assert thresholds({MIB: us(pull=100, nccl=98)})[-1].algo == "one_shot_pull"
    assert thresholds({MIB: us(pull=100, nccl=96)})[-1].algo == "nccl"


def test_a_push_ends_where_it_was_measured():
    assert thresholds({4096: us(push=3)}) == (Threshold(4096, "one_shot_push"), Threshold(None, "nccl"))
    assert thresholds({4096: us(push=3)}, virtual=True)[-1] == Threshold(None, "two_shot_pull")
    assert thresholds({16 * MIB: us(push=3, pull=4)}) == (Threshold(None, "one_shot_pull"),)  # too much memory
    assert thresholds({}) == thresholds({16 * MIB: us(push=3)}) == ()


def line(nbytes, provider, algo, us, mode="graph", **more):
    return {
        "bytes": nbytes, "dtype": "bfloat16", "world": 2, "virtual": False, "algo": algo, "provider": provider,
        "mode": mode, "us": us, "busbw_gbps": us and bus_bandwidth(nbytes, 2, us), "error": 0.0, **more,
    }  # fmt: skip


@pytest.fixture
def data():
    """A results file such as a run on two GPUs writes."""
    file = results.new_file(
        kind="all_reduce", device="NVIDIA H100 80GB HBM3", versions={"torch": "2.11.0", "nccl": "2.28.9"},
        command="bench all-reduce",
        ceilings={"link": "nvlink", "arch": "sm_90", "link_gbps": 478.1, "copy_gbps": 390.0},
    )  # fmt: skip
    file["results"] = [
        line(8 * KIB, OWN, "one_shot_push", 2.5), line(8 * KIB, OWN, "one_shot_pull", 4.0),
        line(8 * KIB, "nccl", "nccl", 6.8), line(8 * KIB, OWN, "auto", 2.4, chosen="one_shot_push"),
        line(MIB, OWN, "one_shot_push", 9.0), line(MIB, OWN, "one_shot_pull", 6.0), line(MIB, "nccl", "nccl", 14.0),
        line(8 * KIB, OWN, "one_shot_push", 5.0, mode="eager"), line(8 * KIB, "nccl", "nccl", 9.0, mode="eager"),
        line(MIB, "symm_mem", "two_shot", None, mode="eager"),
    ]  # fmt: skip
    file["skipped"] = [{"bytes": MIB, "provider": "gloo", "algo": "gloo", "reason": "the stand-in"}]
    return file


def test_rows_of_a_run_are_a_policy(data, tmp_path):
    rows = rows_of(data, arch="sm_90", link="nvlink")
    assert [row.mode for row in rows] == list(MODES) and rows[0].nccl == "2.28.9"
    path = str(tmp_path / "deep" / "policy.json")
    for _ in range(2):  # a second run replaces the rows of the first
        merge(path, rows)
    policy = Policy.load(path)
    assert len(policy.tables[0].rows) == 2
    where = dict(world_size=2, arch="sm_90", link="nvlink", mode="graph")
    assert policy.choose(nbytes=64 * KIB, **where) == ("one_shot_push", "table:policy.json#1")
    assert policy.choose(nbytes=MIB, **where).algo == "one_shot_pull"
    assert describe(rows[1]) == "graph: one_shot_push <= 92681 B, one_shot_pull above"


# -- files, report, picture


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_a_result_of_each_kind_is_checked(kind, data):
    makers = {
        "all_reduce": lambda: tasks.all_reduce([4096], "bfloat16"),
        "qknorm": lambda: tasks.qknorm([4]),
        "step": lambda: tasks.step("tiny", [2], [1], 16),
        "capture": lambda: tasks.capture([16]),
    }
    task = makers[kind]()[0]
    one = {**line(4096, task["provider"], task["algo"], 3.0), **task}
    file = {**data, "kind": kind, "results": [one]}
    assert results.validate(file) == []
    for name in results.FIELDS[kind]:
        without = {key: value for key, value in one.items() if key != name}
        assert results.validate({**file, "results": [without]}) == [f"results[0].{name}: is missing"]
    for name, value in (("us", 0), ("us", "3"), ("virtual", 1), ("world", True), ("mode", None), ("error", "no")):
        assert len(results.validate({**file, "results": [{**one, name: value}]})) == 1, name


def test_report_of_all_reduces(data):
    text = report(data)
    graph = text[text.index("all-reduce, graph") : text.index("all-reduce, eager")].splitlines()
    small = next(shown for shown in graph if shown.startswith("8 KiB"))
    assert small.split()[2:] == ["2.50", "4.00", "6.80", "2.40", "one_shot_push", "3.4", "1%", "2.60"]
    assert "478.1 GB/s nominal" in text and "gloo gloo: the stand-in (1x)" in text
    virtual = copy.deepcopy(data)
    for one in virtual["results"]:
        one["virtual"] = True
    assert "published" not in report(virtual)


def test_report_of_steps_and_captures(data):
    common = {"dtype": "bfloat16", "world": 2, "virtual": False, "mode": "graph", "error": 0.0}
    step = {**common, "batch": 32, "tokens": 4}
    lines = [{**step, "provider": p, "algo": a, "us": us} for p, a, us in
             ((OWN, "auto", 5000.0), ("nccl", "nccl", 5500.0), ("none", "none", 4600.0))]  # fmt: skip
    shown = report({**data, "kind": "step", "results": lines}).splitlines()
    assert ["32", "4", "0.909", "400.0", "900.0"] in [one.split() for one in shown]
    capture = {**common, "graphs": 16, "collectives": 60, "bytes": 65536}
    lines = [{**capture, "provider": p, "algo": a, "us": us} for p, a, us in
             ((OWN, "auto", 176e3), ("nccl", "nccl", 160e3))]  # fmt: skip
    assert "11.00 (+1.00)" in report({**data, "kind": "capture", "results": lines})


def test_read_shows_draws_and_writes_the_table(data, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "run.json").write_text(json.dumps(data))
    picture, table = tmp_path / "run.png", tmp_path / "policy.json"
    words = ["--read", str(tmp_path / "run.json"), "--plot", str(picture), "--table", str(table)]
    assert main(["all-reduce", *words]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(Policy.load(str(table)).tables[0].rows) == 2
    assert "all-reduce, graph" in capsys.readouterr().out


# -- options


def test_dry_run_needs_no_torch():
    code = "import sys; from extend_attn.bench import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.path.join(ROOT, "python")}
    command = [sys.executable, "-c", code, "collectives", "--dry-run", "--device", "cuda"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    shown = done.stdout.splitlines()
    assert sum("one_shot_push" in one and "all_reduce" in one for one in shown) == 15
    assert {one.split()[0] for one in shown} == set(tasks.KINDS)
    of_all_reduce = [one for one in shown if one.startswith("all_reduce")]
    assert all("auto" in one for one in of_all_reduce[-15:])  # they follow the thresholds of the others


@pytest.mark.parametrize(
    "words, said",
    (
        (["all-reduce", "--ranks", "9"], "ranks: got 9"),
        (["all-reduce", "--sizes", "some"], "bytes: got 'some'"),
        (["all-reduce", "--providers", "mpi"], "providers: 'mpi' is none of extend_attn, gloo"),
        (["qknorm", "--tokens", "1,x"], "'1,x'"),
        (["all-reduce", "--device", "cpu", "--virtual-ranks", "2"], "need a GPU"),
        (["collectives", "--algos", "auto"], "name one kind"),
        (["all-reduce", "--read", "/nowhere.json"], "nowhere.json"),
    ),
)
def test_wrong_usage(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_torchruns_other_ranks_have_nothing_to_do(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["all-reduce", "--device", "cpu"]) == 0


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
        assert measured == {
            "all_reduce": {("gloo", "gloo")},
            "qknorm": {("gloo", "two_all_reduces"), ("gloo", "all_gather")},
            "step": {("gloo", "gloo"), ("none", "none")},
            "capture": set(),
        }[kind]
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


# -- measurements, on virtual ranks of a CPU with a communicator of this test's


class Sums:
    """all_reduce for ranks that call one after the other: the last call of a round writes all sums."""

    def __init__(self, world: int, off_by: float = 0.0) -> None:
        self.world, self.off_by, self.waiting = world, off_by, []

    def all_reduce(self, x, *, out=None, algo="auto"):
        out = torch.empty_like(x) if out is None else out
        self.waiting.append((x, out))
        if len(self.waiting) == self.world:
            total = sum(one.float() for one, _ in self.waiting) + self.off_by
            for _, into in self.waiting:
                into.copy_(total)
            self.waiting = []
        return out

    def check(self):
        pass


def virtual(off_by: float = 0.0) -> Ranks:
    comm = Sums(2, off_by)
    return Ranks(2, [Member(rank, CPU, comm=comm) for rank in range(2)], virtual=True)


TASK = {"op": "all_reduce", "bytes": 4098, "dtype": "bfloat16", "provider": OWN, "algo": "auto"}


def test_a_right_sum_is_timed_and_a_wrong_one_is_not():
    ranks = virtual()
    answer = all_reduce.measure(ranks, Providers(ranks, 4098), TASK)
    assert answer["error"] == 0 and answer["us"]["eager"] > 0 and "wrong" not in answer
    ranks = virtual(off_by=1.0)
    answer = all_reduce.measure(ranks, Providers(ranks, 4098), TASK)
    assert answer["us"] == {} and "wrong result of an eager call" in answer["wrong"]


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
