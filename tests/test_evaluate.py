"""The evaluation on random problems and the crossover between the families; what the heuristics owe to both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from tuned import H100

from extend_attn.bench.tuning import crossover
from extend_attn.bench.tuning import evaluate as evaluation
from extend_attn.bench.tuning.sweep import defaults, steps
from extend_attn.bench.tuning.tune import Limits
from extend_attn.plan import DeviceSpec, select

# -- the evaluation


def test_draws_repeat_and_come_from_few_classes():
    drawn = evaluation.draw(200, seed=1)
    assert drawn == evaluation.draw(200, seed=1) != evaluation.draw(200, seed=2)
    assert len(evaluation.CLASSES) <= 6
    kinds = {(p.head_dim_qk, p.dtype, p.kv_dtype, p.group) for _, p in drawn}
    assert len(kinds) == len(evaluation.CLASSES)
    assert len({p for _, p in drawn}) > 190
    assert {p.max_len_extend == 1 for _, p in drawn} == {p.has_prefix for _, p in drawn} == {True, False}


def test_the_share_within_the_tolerance(answers, tmp_path, capsys):
    """Half of the problems have a plan that is twice as fast as the choice."""
    drawn = [p for _, p in evaluation.draw(6, seed=0)]
    plans = {p: defaults(p, H100)[0] for p in drawn}
    for p in drawn:
        plans[p] = [*plans[p], *steps(p, H100, [(plan, 50.0) for plan in plans[p]])]
    for p in drawn[:3]:
        answers.times[plans[p][-1]] = 25.0
    assert not any(plans[p][0] in answers.times for p in drawn)
    hit = sum(any(plan in answers.times for plan in plans[p]) for p in drawn)
    out = tmp_path / "lines.jsonl"
    assert evaluation.evaluate(6, 0, "cuda", Limits(), str(out)) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("all"))
    assert 0 < hit <= 6 and f"{100 * (6 - hit) / 6:.1f} %" in line
    answers.asked.clear()
    evaluation.evaluate(6, 0, "cuda", Limits(), str(out))  # goes on from what is there
    assert not answers.asked and capsys.readouterr().out == said
    assert len(out.read_text().splitlines()) == 6


def test_the_tolerance_is_a_tenth():
    assert evaluation.share([1.0, 1.1, 1.11, 3.0]) == "50.0 %"


# -- the crossover


def test_the_crossover_holds_every_family_to_each_shape(answers, tmp_path, capsys):
    answers.times = {plan: 20.0 for p in crossover.grid() for plan in defaults(p, H100)[0] if plan.family == "tiled"}
    out = tmp_path / "crossover.json"
    assert crossover.crossover("cuda", Limits(), str(out)) == 0
    data = json.loads(out.read_text())
    assert data["device"] == H100.name and len(data["us"]) == len(crossover.grid())
    one = next(line for line in data["us"] if line["head_dim"] == 256 and line["new"] == 24 and line["prefix"])
    assert (one["hopper_packed"], one["hopper_tiled"], one["tiled"]) == (50.0, 50.0, 20.0)
    assert "tiled 20.0 2.50" in capsys.readouterr().out


RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results" / "tuning"


def test_the_heuristics_follow_the_measured_crossover():
    """Of the shapes that were measured, 95 % get a family that takes at most a tenth longer than the best."""
    data = json.loads((RESULTS / "2026-11-25-h100-crossover.json").read_text())
    measured = {tuple(line[name] for name in crossover.SHAPE): line for line in data["us"]}
    ratios = []
    for p in crossover.grid():
        line = measured[crossover.shape_of(p)]
        times = {name: line[name] for name in crossover.COLUMNS if line.get(name)}
        chosen = select(p, H100, plan="heuristic")
        ratios.append(times[crossover.column(chosen)] / min(times.values()))
    assert len(ratios) == len(data["us"]) and max(ratios) < 1.25
    assert sum(ratio <= 1.1 for ratio in ratios) >= 0.95 * len(ratios)


def test_the_heuristics_follow_the_sweeps():
    """Of the swept problems whose choice was measured, 95 % get a plan at most a tenth slower than the best."""
    device = dataclasses.replace(DeviceSpec.preset("h200"), triton="3.6.0")
    ratios = []
    lines = [line for path in RESULTS.glob("*-h200-evaluate-*.jsonl") for line in path.read_text().splitlines()]
    for line in lines:
        swept = evaluation.Outcome.from_json(json.loads(line))
        chosen = select(swept.problem, device, plan="heuristic")
        us = swept.plans.get(str(chosen))
        if us is not None:
            ratios.append(us / swept.best_us)
    assert len(ratios) >= 390 and max(ratios) < 1.26  # other numbers of splits, or gathered ahead, were not measured
    assert sum(ratio <= evaluation.TOLERANCE for ratio in ratios) >= 0.95 * len(ratios)
