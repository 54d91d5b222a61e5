"""``tune``: no time for a wrong result, rows with provenance, a run that goes on where it ended; its command line."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tuned import H100, Answers, problem

from extend_attn.attention import prepare
from extend_attn.bench.data import make_batch
from extend_attn.bench.problems import MORE, PUBLISHED
from extend_attn.bench.providers.base import Skip
from extend_attn.bench.tuning import evaluate as evaluation
from extend_attn.bench.tuning import tune as tuning
from extend_attn.bench.tuning.posed import lengths_of, pose
from extend_attn.bench.tuning.sweep import FAR_BEHIND, defaults, steps
from extend_attn.bench.tuning.tune import Limits, best_of, tune
from extend_attn.cli import tune as command
from extend_attn.plan import DeviceSpec, Plan, Tile, illegal, select
from extend_attn.plan.heuristics import heuristic
from extend_attn.plan.tables import load

CPU = torch.device("cpu")


POSED = {
    "plain": problem(),
    "no prefix": problem(num_kv_indices=0),
    "long arrays": problem(num_tokens=50, num_kv_indices=1000, max_len_prefix=9),
    "everything": problem(custom_mask=True, mask_prefix=True, sinks=True, return_lse=True, sliding_window=7,
                          window_offsets=True, q_positions=True, logit_cap=5.0, xai_temperature_len=4, is_causal=False),
    "unified": problem(unified=True, index_dtype="int32", custom_mask=True),
    "fp8": problem(dtype="bfloat16", kv_dtype="float8_e4m3fn", out_dtype="float32"),
    "mla": problem(head_dim_qk=48, num_kv_heads=1, v_aliases_k_pool=True, v_aliases_k_new=True),
    "misaligned": problem(alignment=4),
    "one head": problem(num_q_heads=1, num_kv_heads=1, dtype="float16", alignment=2),
}  # fmt: skip


@pytest.mark.parametrize("name", POSED)
def test_posed_tensors_are_the_problem(name):
    posed = pose(POSED[name], CPU, num_sets=2)
    for one in posed.sets:
        assert one.problem().key() == POSED[name].key()
        assert one.kv_indices.numel() == POSED[name].num_kv_indices and one.q.shape[0] == POSED[name].num_tokens
    used = POSED[name].batch_size * posed.new
    assert torch.isfinite(posed.expected()[:used]).all() and torch.isnan(posed.expected()[used:]).all()
    assert not torch.equal(posed.sets[0].q, posed.sets[1].q)


def test_a_preallocated_array_does_not_fill_the_memory():
    huge = problem(num_kv_indices=1 << 22, batch_size=1, num_tokens=4, num_kv_heads=1, num_q_heads=1)
    import extend_attn.bench.tuning.posed as module

    assert lengths_of(huge) == (4, 1 << 22)
    before, module.MOST_POOL_BYTES = module.MOST_POOL_BYTES, 1 << 20
    try:
        posed = pose(huge, CPU, num_sets=2)
    finally:
        module.MOST_POOL_BYTES = before
    assert posed.sets[0].kv_indices.numel() == 1 << 22
    assert posed.prefix * 2 * 4 * 64 <= 1 << 20


def test_nothing_to_compute_is_skipped():
    with pytest.raises(Skip, match="no new tokens"):
        pose(problem(num_tokens=0), CPU)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_sweeps_hold_the_choice_and_nothing_illegal(arch):
    device = DeviceSpec.preset(arch)
    for _, drawn in evaluation.draw(24, seed=3):
        legal, others = defaults(drawn, device)
        assert legal[0] == select(drawn, device)
        assert select(drawn, device, plan="heuristic") in legal
        further = steps(drawn, device, [(plan, 10.0) for plan in legal])
        assert len(legal) + len(further) == len({*legal, *further}) >= 6
        assert all(illegal(drawn, plan, device) is None for plan in (*legal, *further))
        assert all(reason for _, reason in others)
        if drawn.max_len_extend <= 16:
            assert {plan.packed for plan in legal} == {True, False}
        assert heuristic(drawn, device).family in {plan.family for plan in legal} or arch != "sm_90"


def test_a_family_that_is_far_behind_is_not_stepped_around():
    legal, _ = defaults(problem(dtype="bfloat16"), H100)
    first = {"hopper_packed": 10.0, "tiled": 9.9 * FAR_BEHIND, "packed": 10.1 * FAR_BEHIND}
    found = steps(problem(dtype="bfloat16"), H100, [(plan, first.get(plan.family)) for plan in legal])
    assert {plan.family for plan in found} == {"hopper_packed", "tiled"}
    assert not set(found) & set(legal)


# -- the worker


@pytest.fixture
def worker(monkeypatch):
    """A worker in this process whose kernels are replaced: an answer by the reference, spoilt on request."""
    from extend_attn import reference
    from extend_attn.bench.tuning import worker as module

    spoilt = []

    def run_plan(plan, inputs, asked, *, explicit):
        assert explicit
        reference.run(inputs)
        if plan in spoilt:
            inputs.o[0, 0, 0] += 1.0

    monkeypatch.setattr(module, "run_plan", run_plan)
    made = module.TuningWorker(CPU)
    made.spoilt = spoilt
    return made


GOOD, BAD = Plan("packed", Tile(16, 32)), Plan("packed", Tile(16, 64))


def test_a_wrong_result_is_never_timed(worker):
    task = {"op": "measure", "problem": problem().to_json(), "plan": GOOD.to_json()}
    assert worker.answer(task)["us"] > 0
    worker.spoilt.append(GOOD)
    answer = worker.answer(task)
    assert "wrong result" in answer["failed"] and "us" not in answer


def test_the_worker_names_its_device(worker):
    assert DeviceSpec(**json.loads(json.dumps(worker.answer({"op": "spec"})["spec"]))).arch == "sm_90"


# -- a run, with a worker that answers by itself


def measured(table):
    return {row.problem: row for row in load(str(table)).rows}


def test_the_fastest_right_plan_becomes_a_row_with_its_provenance(answers, tmp_path):
    legal, _ = defaults(problem(), H100)
    legal += steps(problem(), H100, [(plan, 50.0) for plan in legal])
    answers.times = {legal[2]: 40.0, legal[1]: "wrong result: max error 1", legal[3]: "no answer within 60 s; killed"}
    table = tmp_path / "table.json"
    assert tune([problem()], "cuda", Limits(), table=str(table), command="tune --it") == 1  # a result was wrong
    row = measured(table)[problem()]
    assert row.plan == legal[2] and row.us == 40.0
    assert (row.device, row.sm_count, row.triton, row.command) == (H100.name, 132, "3.6.0", "tune --it")
    assert load(str(table)).arch == "sm_90" and row.date.count("-") == 2
    assert best_of([tuning.Trial(GOOD, None, "why")]) is None


@pytest.mark.parametrize("us, wins", [(49.5, False), (48.0, True)])
def test_a_plan_must_beat_the_heuristic_by_more_than_chance(answers, tmp_path, us, wins):
    own, other = defaults(problem(), H100)[0][:2]
    answers.times = {other: us}
    table = tmp_path / "table.json"
    assert tune([problem()], "cuda", Limits(), table=str(table), command="") == 0
    row = measured(table)[problem()]
    assert (row.plan, row.us) == ((other, us) if wins else (own, 50.0))


def test_the_fastest_are_measured_again_and_the_lower_figure_counts(answers, monkeypatch, tmp_path):
    """The first plan comes out slow the first time only; a plan whose second result is wrong is no row."""
    own, other = defaults(problem(), H100)[0][:2]
    third = steps(problem(), H100, [(own, 50.0)])[0]
    seen = []

    def ask(self, task):
        answer = honest(self, task)
        if task["op"] == "measure":
            plan = Plan.from_json(task["plan"])
            seen.append(plan)
            if plan == own and seen.count(plan) == 1:
                return {"us": 54.0}
            if plan == third and seen.count(plan) == 2:
                return {"failed": "wrong result: max error 1"}
        return answer

    honest = Answers.ask
    monkeypatch.setattr(Answers, "ask", ask)
    answers.times = {other: 51.0, third: 45.0}
    table = tmp_path / "table.json"
    assert tune([problem()], "cuda", Limits(), table=str(table), command="") == 1
    row = measured(table)[problem()]
    assert (row.plan, row.us) == (own, 50.0)
    assert seen[-1] == own and seen.count(third) == 2


def test_a_run_goes_on_where_it_ended(answers, tmp_path):
    table = str(tmp_path / "table.json")
    several = [problem(batch_size=n, num_tokens=4 * n) for n in (1, 2, 4)]
    assert tune(several[:2], "cuda", Limits(), table=table, command="") == 0
    answers.asked.clear()
    assert tune(several, "cuda", Limits(), table=table, command="") == 0
    assert {asked for asked, _ in answers.asked} == {several[2]}
    assert set(measured(table)) == set(several)
    answers.asked.clear()
    assert tune(several, "cuda", Limits(), table=table, command="", again=True) == 0
    assert {asked for asked, _ in answers.asked} == set(several)


def test_a_spent_budget_begins_nothing(answers, tmp_path, capsys):
    assert tune([problem()], "cuda", Limits(budget=0.0), table=str(tmp_path / "t.json"), command="") == 0
    assert not answers.asked and "1 left" in capsys.readouterr().err


def test_a_problem_without_a_plan_fails(answers, tmp_path):
    answers.times = dict.fromkeys(defaults(problem(), H100)[0], "OutOfResources")
    assert tune([problem()], "cuda", Limits(), table=str(tmp_path / "t.json"), command="") == 1


def test_compiling_beforehand_asks_for_each_kernel_once(monkeypatch, answers):
    tasks = []
    monkeypatch.setattr(tuning, "compile_all", lambda wanted, *arguments, **options: tasks.extend(wanted))
    plans = defaults(problem(), H100)[0]
    with tuning.Tuner("cuda", Limits()) as tuner:
        one = tuner.compile([(problem(), plans)])
        tasks.clear()
        alike = [problem(), problem(num_kv_indices=61), problem(num_tokens=11)]
        assert tuner.compile((p, plans) for p in alike) == one == len(tasks)
        assert tuner.compile((p, plans) for p in (problem(), problem(sinks=True))) == 2 * one


def test_a_budget_of_nothing_compiles_and_measures_nothing(monkeypatch, answers, capsys):
    tasks = []
    monkeypatch.setattr(tuning, "compile_all", lambda wanted, *arguments, **options: tasks.extend(wanted))
    assert evaluation.evaluate(6, 0, "cuda", Limits(budget=0.0)) == 0
    assert tasks and not answers.asked and "6 left" in capsys.readouterr().err


# -- the command line


def test_problems_from_files_flags_and_models(tmp_path):
    parser = command._parser()
    path = tmp_path / "list.json"
    path.write_text(json.dumps([problem().to_json(), problem().to_json()]))
    model = "head_dim=64,num_q_heads=8,num_kv_heads=2,batch_sizes=1:8,max_len_extend=4,dtype=float16,sinks=true"
    args = parser.parse_args(["--problems", str(path), "--model", model])
    found = command.problems_from(args, parser)
    assert found[0] == problem() and len(found) == 5
    assert {(p.batch_size, p.dtype, p.sinks, p.has_prefix) for p in found[1:]} == {
        (b, "float16", True, with_prefix) for b in (1, 8) for with_prefix in (True, False)
    }
    one = tmp_path / "one.json"
    one.write_text(json.dumps(problem().to_json()))
    args = parser.parse_args(["--problem", str(one), "--batch-size", "7"])
    assert command.problems_from(args, parser) == [problem(batch_size=7)]


def test_rows_of_the_bench_are_the_problems_of_their_calls():
    parser = command._parser()
    found = command.problems_from(parser.parse_args(["--rows", "mla_verify,tree16,fp8_decode64,verify_chat"]), parser)
    assert [p.num_q_heads for p in found] == [16, 8, 32, 8]
    for row in MORE + PUBLISHED:
        row = dataclasses.replace(row, batch=2, prefix=row.prefix and 9, new_tokens=min(row.new_tokens, 4), page=1)
        batch = make_batch(row, CPU, num_sets=1)
        assert prepare(*batch.arguments(0), sliding_window_size=batch.window)[1] == row.problem(), row


@pytest.mark.parametrize("wrong", [["--model", "head_dim"], ["--model", "heads=3"], ["--problems", "/nowhere"], []])
def test_wrong_usage(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(wrong)
    assert ended.value.code == 2 and "error" in capsys.readouterr().err


def test_without_a_gpu_it_says_so():
    """In a process of its own, as a user meets it."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    arguments = "--model head_dim=64,num_q_heads=2,num_kv_heads=1,batch_sizes=1,max_len_extend=1".split()
    run = [sys.executable, "-m", "extend_attn", "tune", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent / "python")}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "nothing can be measured on cuda" in done.stderr, done.stderr
