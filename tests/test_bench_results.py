"""What a run of the bench leaves behind: the results file, the report, the plot, the table of measured plans."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path

import pytest

from extend_attn.bench import main, results
from extend_attn.bench.problems import NOMINAL, PUBLISHED, ROWS, Ceilings, floor
from extend_attn.bench.providers import OWN
from extend_attn.bench.report import comparison, finding, plan_text, report, summary
from extend_attn.bench.tuned import merge, winners
from extend_attn.plan import DeviceSpec, select
from extend_attn.plan.candidates import sweep12
from extend_attn.problem import Problem

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = sorted((ROOT / "bench" / "results").glob("*.json"))
COLUMNS = ("extend_attn", "sglang-tuned", "fa3", "fa4", "flashinfer-fa2", "sdpa-cudnn")

PLAN = {
    "family": "tiled",
    "tile": {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 3},
    "split_kv": 1,
    "pack_gqa": True,
    "tma": True,
    "pdl": False,
    "source": "heuristic",
}


def line(row, provider, us, plan=None, error=2e-3, eager=None):
    return {
        "row": row, "provider": provider, "us_graph": us, "us_do_bench": eager or (us and us + 6),
        "floor_us": floor(ROWS[row], NOMINAL).us, "error": error, "plan": plan,
    }  # fmt: skip


@pytest.fixture
def data():
    """A results file such as a run on a GPU writes."""
    file = results.new_file(
        device="NVIDIA H200", versions={"torch": "2.11.0"}, command="bench attention", ceilings=NOMINAL._asdict()
    )
    file["results"] = [
        line("prefill_long", OWN, 540.0, PLAN),
        line("prefill_long", OWN, 2400.0, {**PLAN, "source": "sglang-legacy"}),
        line("prefill_long", OWN, 1200.0, {**PLAN, "source": "sglang"}),
        line("prefill_long", "sglang-legacy", 2576.0),
        line("prefill_long", "sglang-tuned", 1888.0),
        line("prefill_long", "fa3", 403.0, {"page_size": None, "library": "x.so"}),
        line("verify_chat", OWN, 66.0, {**PLAN, "family": "packed", "split_kv": 2}),
        line("verify_chat", "sglang-tuned", 142.0),
        line("verify_chat", "flashinfer-fa2", None, error=0.7),
    ]
    file["skipped"] = [{"row": r, "provider": "flex", "reason": "not asked for", "plan": None} for r in ROWS]
    return file


def test_results_are_written_and_read_back(data, tmp_path):
    path = str(tmp_path / "deep" / "run.json")
    results.save(data, path)
    assert results.load(path) == data
    assert os.listdir(tmp_path / "deep") == ["run.json"]


@pytest.mark.parametrize(
    "break_it, said",
    [
        (lambda d: d.update(schema=2), "schema"),
        (lambda d: d.update(kind="speed"), "kind"),
        (lambda d: d.update(date="yesterday"), "ISO 8601"),
        (lambda d: d.update(ceilings={"read_gbps": 0, "matmul_tflops": 1.0}), "read_gbps"),
        (lambda d: d.pop("versions"), "versions"),
        (lambda d: d.update(results={}), "results"),
        (lambda d: d["results"][0].pop("floor_us"), "results[0].floor_us"),
        (lambda d: d["results"][1].update(us_graph=-1.0), "results[1].us_graph"),
        (lambda d: d["results"][2].update(row=3), "results[2].row"),
        (lambda d: d["results"][3].update(plan="fast"), "results[3].plan"),
        (lambda d: d["results"][4].pop("plan"), "results[4].plan"),
    ],
)
def test_a_broken_results_file_is_refused(data, tmp_path, break_it, said):
    assert results.validate(data) == []
    broken = copy.deepcopy(data)
    break_it(broken)
    assert any(said in why for why in results.validate(broken))
    with pytest.raises(ValueError, match="results"):
        results.save(broken, str(tmp_path / "x.json"))
    assert not os.listdir(tmp_path)
    (tmp_path / "x.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError):
        results.load(str(tmp_path / "x.json"))


def test_a_result_that_is_wrong_keeps_no_time():
    answer = {"us_graph": 3.0, "us_do_bench": 4.0, "error": float("inf"), "plan": None, "failed": "wrong result"}
    result = results.new_result("chunk8", OWN, 11.0, answer)
    assert result["us_graph"] is None and result["us_do_bench"] is None and result["error"] is None
    answer.pop("failed")
    assert results.new_result("chunk8", OWN, 11.0, answer)["us_graph"] == 3.0


def test_report_says_what_was_measured(data):
    text = report(data)
    for said in ("NVIDIA H200", "4555 GB/s", "509 TFLOP/s", "64%", "tiled 64x64 w4 s3 pack_gqa tma [heuristic]",
                 "packed 64x64 w4 s3 split 2", "WRONG RESULT", "flex: not asked for", "2010 GB/s"):  # fmt: skip
        assert said in text, said
    assert plan_text(None) == "-"


def test_comparison_takes_the_fastest_plan(data):
    prefill = next(one for one in comparison(data).splitlines() if one.startswith("prefill_long"))
    assert "540.0" in prefill and "1888 (0.29)" in prefill and "403.0 (1.34)" in prefill
    assert prefill.split()[-1] == "1.34"


def test_summary_is_a_geometric_mean(data):
    tuned = next(one for one in summary(data).splitlines() if one.startswith("sglang-tuned"))
    mean = ((540.0 / 1888.0) * (66.0 / 142.0)) ** 0.5
    assert f"{mean:.3f}" in tuned and f"{66 / 142:.3f}" in tuned and tuned.endswith("verify_chat")


def test_finding_pairs_legacy_and_tuned(data):
    found = next(one for one in finding(data).splitlines() if one.startswith("prefill_long"))
    assert "2.00x" in found and "1.36x" in found
    data["results"] = [one for one in data["results"] if one["row"] == "verify_chat"]
    assert finding(data) == ""


def test_rate_follows_what_binds(data):
    slow = Ceilings(read_gbps=1.0, matmul_tflops=1e6)
    data["ceilings"] = slow._asdict()
    assert "TFLOP/s" not in report(data).split("us, graph replay")[0].split("read,")[1].split("\n", 1)[1]


def test_plot_draws(data, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "run.json").write_text(json.dumps(data))
    picture = tmp_path / "run.png"
    assert main(["attention", "--read", str(tmp_path / "run.json"), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_of_nothing_is_an_error(data, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    data["results"] = []
    (tmp_path / "run.json").write_text(json.dumps(data))
    assert main(["attention", "--read", str(tmp_path / "run.json"), "--plot", str(tmp_path / "x.png")]) == 1
    assert "no time" in capsys.readouterr().err


def test_the_fastest_plan_of_each_problem_makes_a_table(data, tmp_path):
    problem = Problem(
        dtype="bfloat16", head_dim_qk=256, head_dim_v=256, num_q_heads=8, num_kv_heads=4, batch_size=1,
        num_tokens=8192, max_len_extend=8192, num_kv_indices=0,
    )  # fmt: skip
    slow, fast = (plan.to_json() for plan in sweep12()[:2])
    measured = [{"problem": problem.to_json(), "plan": p, "us_graph": us} for p, us in ((slow, 9.0), (fast, 7.0))]
    rows = winners(measured, data, 132)
    assert len(rows) == 1 and rows[0]["us"] == 7.0
    path = str(tmp_path / "table.json")
    for _ in range(2):  # measured again, the row is replaced
        merge(path, "sm_90", rows)
    chosen = select(problem, DeviceSpec.preset("h200"), table=path)
    assert chosen.tile.to_json() == fast["tile"] and chosen.source == "table:table.json#0"
    with pytest.raises(ValueError, match="sm_80"):
        merge(path, "sm_80", rows)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_can_be_read(path):
    assert results.load(str(path))["results"]


def test_the_readme_shows_the_committed_run():
    """Of each row and provider the fastest plan of the two halves of the run; every row that was published before."""
    text = (ROOT / "README.md").read_text()
    us = {}
    for name in set(re.findall(r"bench/results/(\S+-(?:verify|prefill))\.json", text)):
        for result in results.load(str(ROOT / "bench" / "results" / f"{name}.json"))["results"]:
            key = result["row"], result["provider"]
            if result["us_graph"] is not None:
                us[key] = min(us.get(key, result["us_graph"]), result["us_graph"])
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    lines = [[cell.strip(" *") for cell in cells] for cells in rows]
    shown = {cells[0]: cells for cells in lines if (cells[0], "extend_attn") in us}
    assert set(shown) >= {row.name for row in PUBLISHED}
    for row, cells in shown.items():
        for provider, cell in zip(COLUMNS, cells[3:]):
            value = us.get((row, provider))
            wanted = "" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
            assert cell == wanted, (row, provider)
        assert float(cells[-1]) == round(us[row, "extend_attn"] / us[row, "sglang-tuned"], 2), row
