"""The collective benches without a GPU: arithmetic, policy rows, results files, report, options."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest

from extend_attn.bench import main, results
from extend_attn.bench.collectives import tasks
from extend_attn.bench.collectives.arithmetic import LARGEST, PUBLISHED_US, SMALLEST, bus_bandwidth, sizes_named
from extend_attn.bench.collectives.report import report
from extend_attn.bench.collectives.shapes import MODELS
from extend_attn.bench.collectives.table_rows import describe, merge, rows_of, thresholds, told_apart
from extend_attn.bench.providers.base import OWN
from extend_attn.comm.policy import MODES, Policy, Threshold

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
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
    assert m.all_reduces == 90


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


def test_eager_calls_that_the_launch_decides_follow_the_replayed_times():
    large = us(push=40, pull=20)
    eager = {4 * KIB: us(push=33.5, pull=17.1, nccl=35), 8 * KIB: us(push=20, pull=30, nccl=35), MIB: large}
    graph = {4 * KIB: us(push=2.2, pull=4, nccl=6), 8 * KIB: us(push=2.5, pull=6, nccl=6), MIB: large}
    apart = told_apart(eager, graph)
    assert [one.algo for one in thresholds(apart)] == ["one_shot_push", "one_shot_pull"]
    assert apart[4 * KIB] == us(push=17.1, pull=17.1 * 4 / 2.2, nccl=35)  # NCCL's launch is its own
    assert apart[MIB] == eager[MIB]
    assert told_apart(eager, {}) == eager


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
    lines = [{**capture, "provider": p, "algo": a, "us": us, "exchanges": 1} for p, a, us in
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


def test_a_bench_can_be_called_again_in_one_process(capsys):
    """A submodule named like the package's function would take its place when it is first imported."""
    import extend_attn.bench

    for words in (["attention", "--list"], ["all-reduce", "--dry-run"]) * 2:
        assert extend_attn.bench.main(words) == 0
    capsys.readouterr()
