"""The command line: explain over every field of a problem, doctor, wrong usage, what is drawn."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys

import pytest

from extend_attn.__main__ import COMMANDS, main
from extend_attn.cli import doctor, explain, render
from extend_attn.problem import Problem

PROBLEM = Problem(
    dtype="bfloat16",
    head_dim_qk=256,
    head_dim_v=256,
    num_q_heads=8,
    num_kv_heads=4,
    batch_size=32,
    num_tokens=128,
    max_len_extend=4,
    num_kv_indices=256000,
)
# A value other than the default for each field; together they must still be a problem.
OTHER = {
    "dtype": "float16",
    "head_dim_qk": 192,
    "head_dim_v": 128,
    "num_q_heads": 12,
    "num_kv_heads": 3,
    "batch_size": 5,
    "num_tokens": 77,
    "max_len_extend": 40,
    "num_kv_indices": 999,
    "kv_dtype": "float8_e5m2",
    "out_dtype": "float32",
    "index_dtype": "int32",
    "max_len_prefix": 300,
    "is_causal": False,
    "custom_mask": True,
    "mask_prefix": True,
    "sliding_window": 127,
    "window_offsets": True,
    "q_positions": True,
    "sinks": True,
    "logit_cap": 30.0,
    "xai_temperature_len": 4096,
    "return_lse": True,
    "unified": True,
    "v_aliases_k_pool": True,
    "v_aliases_k_new": True,
    "batch_invariant": True,
    "alignment": 8,
}


def flags(values: dict) -> list:
    """The flags that say these field values."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def parsed(*words: str) -> Problem:
    """The problem that ``explain attention`` makes of its words."""
    parser = explain._parser()
    return explain.problem_from(parser.parse_args(["attention", *words]), parser)


def needed() -> dict:
    return {name: value for name, value in PROBLEM.to_json().items() if name in list(OTHER)[:9]}


def test_other_values_cover_every_field():
    assert list(OTHER) == [field.name for field in dataclasses.fields(Problem)]
    assert not [name for name, value in OTHER.items() if value == getattr(PROBLEM, name)]


@pytest.mark.parametrize("name", list(OTHER))
def test_every_field_is_a_flag(name):
    values = {**needed(), name: OTHER[name]}
    if name == "mask_prefix":
        values["custom_mask"] = True
    if name in ("dtype", "num_q_heads", "num_kv_heads"):  # keep heads divisible
        values.update(num_q_heads=12, num_kv_heads=3)
    assert parsed(*flags(values)) == Problem(**values)


def test_problem_file_and_flags_over_it(tmp_path):
    path = tmp_path / "problem.json"
    path.write_text(json.dumps(PROBLEM.to_json()))
    assert parsed("--problem", str(path)) == PROBLEM
    assert parsed("--problem", str(path), "--batch-size", "3") == dataclasses.replace(PROBLEM, batch_size=3)


def test_problem_from_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(PROBLEM.to_json())))
    assert parsed("--problem", "-") == PROBLEM


@pytest.mark.parametrize("device", ["h100", "h200", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "hip"])
def test_explain_prints_the_choice(device, capsys):
    assert main(["explain", "attention", "--device", device, *flags(needed())]) == 0
    from extend_attn import select_plan

    chosen = select_plan(PROBLEM, device)
    printed = capsys.readouterr().out
    assert str(chosen.tile) in printed and chosen.source in printed


def test_explain_json(capsys):
    assert main(["explain", "attention", "--device", "h100", "--json", *flags(needed())]) == 0
    data = json.loads(capsys.readouterr().out)
    from extend_attn import explain as explain_function

    assert data == json.loads(json.dumps(explain_function(PROBLEM, "h100").to_json()))


def test_explain_says_why_a_plan_is_illegal(capsys):
    """fp32 at head dim 512 does not fit every candidate tile in 99 KB."""
    values = {**needed(), "dtype": "float32", "head_dim_qk": 512, "head_dim_v": 512}
    assert main(["explain", "attention", "--device", "sm_86", *flags(values)]) == 0
    assert "shared memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "--batch-size"),
        (["--device", "h100", *flags({**OTHER, "num_q_heads": 13})], "num_q_heads"),
        (["--device", "h100", *flags({**OTHER, "dtype": "int8"})], "dtype"),
        (["--device", "potato", *flags({"dtype": "bfloat16"})], "--batch-size"),
        (["--problem", "no/such/file.json"], "no/such/file.json"),
    ],
)
def test_explain_wrong_usage(words, said, capsys):
    with pytest.raises(SystemExit) as raised:
        main(["explain", "attention", *words])
    assert raised.value.code == 2
    assert said in capsys.readouterr().err


def test_explain_unknown_device_names_the_known(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["explain", "attention", "--device", "potato", *flags(needed())])
    assert raised.value.code == 2
    message = capsys.readouterr().err
    assert "potato" in message and "h100" in message


def test_explain_runs_without_torch():
    words = ["explain", "attention", "--device", "sm_90", *flags(needed())]
    code = (
        "import sys; sys.modules['torch'] = sys.modules['triton'] = None\n"
        f"from extend_attn.__main__ import main; sys.exit(main({words!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "packed" in done.stdout


def test_usage(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("extend-attn ")
    assert main(["no-such-command"]) == 2
    assert "no-such-command" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_each_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as raised:
        main([name, "--help"])
    assert raised.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_doctor(capsys):
    status = main(["doctor", "--json"])
    data = json.loads(capsys.readouterr().out)
    assert status == (1 if data["problems"] else 0)
    assert data["versions"]["torch"].startswith(__import__("torch").__version__.split("+")[0])
    assert main(["doctor"]) == status
    text = capsys.readouterr().out
    assert all(title in text for title in ("packages", "devices", "folders", "settings", "problems"))


def test_doctor_finds_what_is_missing(monkeypatch, capsys):
    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    assert main(["doctor"]) == 1
    assert "triton is not installed" in capsys.readouterr().out


def test_doctor_finds_an_old_triton():
    assert "3.1.0" in doctor._triton_problems("3.1.0")[0]
    assert doctor._triton_problems("3.10.0") == []


def test_table():
    text = render.format_table(("name", "us"), [("a", "1.5"), ("longer", "-12")])
    assert text.splitlines() == ["name     us", "------  ---", "a       1.5", "longer  -12"]


def test_progress_without_a_terminal_is_a_line_a_step(capsys):
    with render.progress(2, "demo") as advance:
        advance("first")
        advance("second")
    assert capsys.readouterr().err.splitlines() == ["[1/2] demo: first", "[2/2] demo: second"]


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    pytest.importorskip("rich")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with render.progress(2, "demo") as advance:
        advance("first")
        advance("second")
    assert "second" in terminal.getvalue() and "[2/2]" not in terminal.getvalue()
