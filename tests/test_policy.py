"""The all-reduce policy: thresholds, whose table comes first, the heuristic, bad files, the digest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from extend_attn.__main__ import main
from extend_attn.comm import policy
from extend_attn.comm.policy import ALGOS, LINKS, MODES, OWN, WORLD_SIZES, Policy
from extend_attn.comm.sizes import format_bytes, parse_bytes
from extend_attn.plan import tables

HERE = dict(world_size=2, arch="sm_90", link="nvlink")


@pytest.fixture(autouse=True)
def nobody_has_a_table(monkeypatch, tmp_path):
    """No packaged rows, no variable, an empty config folder."""
    monkeypatch.setattr(policy, "PACKAGED", tmp_path / "packaged.json")
    monkeypatch.setattr(tables, "user_folder", lambda: tmp_path / "config")
    monkeypatch.delenv(policy.ENVIRONMENT, raising=False)
    tables.forget()
    yield
    tables.forget()


def row(*thresholds, **changes):
    pairs = thresholds or ((4096, "one_shot_push"), (None, "nccl"))
    return {
        "arch": "sm_90",
        "device": "NVIDIA H100 80GB HBM3",
        "link": "nvlink",
        "world_size": 2,
        "mode": "graph",
        "torch": "2.11.0",
        "nccl": "2.28.9",
        "date": "2026-11-25",
        "command": "python -m extend_attn bench all-reduce",
        "thresholds": [{"max_bytes": limit, "algo": algo} for limit, algo in pairs],
        **changes,
    }


def write(path, *rows, **top):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": 1, "rows": list(rows), **top}))
    return str(path)


def algo(chosen, nbytes, **changes):
    return chosen.choose(nbytes=nbytes, **{**HERE, "mode": "graph", **changes}).algo


# -- which row, which threshold


def test_a_threshold_includes_its_own_size(tmp_path):
    pairs = (4096, "one_shot_push"), (65536, "one_shot_pull"), (1 << 20, "two_shot_pull"), (None, "nccl")
    chosen = Policy.load(write(tmp_path / "t.json", row(*pairs)))
    edges = [1, 4096, 4097, 65536, 65537, 1 << 20, (1 << 20) + 1, 1 << 40]
    assert [algo(chosen, n) for n in edges] == [name for _, name in pairs for _ in range(2)]


@pytest.mark.parametrize(
    "changes", ({"mode": "eager"}, {"arch": "sm_80"}, {"link": "pcie"}, {"world_size": 3}, {"world_size": 4})
)
def test_a_row_answers_its_own_machine_and_mode_only(tmp_path, changes):
    chosen = Policy.load(write(tmp_path / "mine.json", row((None, "two_shot_pull"))))
    assert chosen.choose(nbytes=16, **HERE, mode="graph") == ("two_shot_pull", "table:mine.json#0")
    assert chosen.choose(**{**HERE, "nbytes": 16, "mode": "graph", **changes}).source == "heuristic"


def test_the_first_row_that_speaks_wins_and_is_named(tmp_path):
    path = write(tmp_path / "t.json", row(mode="eager"), row((None, "one_shot_pull")), row((None, "nccl")))
    assert Policy.load(path).choose(nbytes=16, **HERE, mode="graph") == ("one_shot_pull", "table:t.json#1")


def test_the_order_of_tables(tmp_path, monkeypatch):
    def source():
        return Policy.load().choose(nbytes=16, **HERE, mode="graph").source

    assert source() == "heuristic"
    write(policy.PACKAGED, row())
    assert source() == "table:packaged.json#0"
    write(tmp_path / "config" / policy.USER_FILE, row())
    tables.forget()
    assert source() == "table:all_reduce.json#0"
    monkeypatch.setenv(policy.ENVIRONMENT, write(tmp_path / "environment.json", row()))
    assert source() == "table:environment.json#0"
    argument = Policy.load(write(tmp_path / "argument.json", row()))
    assert argument.choose(nbytes=16, **HERE, mode="graph").source == "table:argument.json#0"
    # what the user's table does not cover goes on to the packaged one
    other = Policy.load(write(tmp_path / "other.json", row(mode="eager")))
    assert other.choose(nbytes=16, **HERE, mode="graph").source == "table:packaged.json#0"


def test_the_users_table_of_plans_is_another_file(tmp_path, monkeypatch):
    """Two kinds of table in one config folder must not be taken for each other."""
    monkeypatch.setattr(tables, "user_folder", lambda: tmp_path)
    for name in (tables.USER_FILE, policy.USER_FILE):
        (tmp_path / name).write_text("{}")
    assert tables.user_table_path() == str(tmp_path / "table.json")
    assert tables.user_file(None, policy.ENVIRONMENT, policy.USER_FILE) == str(tmp_path / "all_reduce.json")


def test_push_limit_is_the_larger_of_both_modes(tmp_path):
    graph, eager = row((4096, "one_shot_push"), (None, "nccl")), row((8192, "one_shot_push"), (None, "nccl"))
    eager["mode"] = "eager"
    assert Policy.load(write(tmp_path / "a.json", graph, eager)).push_limit(2, "sm_90", "nvlink") == 8192
    without = [row((None, "nccl"), mode=mode) for mode in MODES]
    assert Policy.load(write(tmp_path / "b.json", *without)).push_limit(2, "sm_90", "nvlink") == 0


# -- the heuristic


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_heuristic_is_a_sound_row(link, world_size):
    """It passes the checks that a file's rows pass, and a push never goes on beyond what a buffer is made for."""
    thresholds = policy.heuristic_thresholds(link, world_size)
    for mode in MODES:
        pairs = [(one.max_bytes, one.algo) for one in thresholds]
        read = policy.Row.from_json(row(*pairs, link=link, world_size=world_size, mode=mode))
        assert read.thresholds == thresholds
        limit = Policy().push_limit(world_size, "sm_90", link)
        for nbytes in (1, limit, limit + 1, 1 << 30):
            chosen = Policy().choose(world_size=world_size, nbytes=nbytes, arch="sm_90", link=link, mode=mode).algo
            assert chosen in (OWN if link == "virtual" else ALGOS)
            assert chosen != "one_shot_push" or nbytes <= limit


def test_the_heuristic_of_two_gpus_on_nvlink_has_nccl_from_8_mib():
    sizes = [8 << 10, 1 << 20, 2 << 20, 8 << 20, 16 << 20]
    expected = ["one_shot_push", "one_shot_push", "one_shot_push", "one_shot_pull", "nccl"]
    assert [algo(Policy(), n) for n in sizes] == expected == [algo(Policy(), n, mode="eager") for n in sizes]


@pytest.mark.parametrize("changes", ({"link": "ethernet"}, {"mode": "jit"}, {"world_size": 9}, {"world_size": 1}))
def test_an_unknown_key_is_named(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"^{name}: got .*; expected one of"):
        algo(Policy(), 16, **changes)


# -- the digest


def test_the_digest_follows_the_choices_and_not_the_file_name(tmp_path):
    one = Policy.load(write(tmp_path / "a.json", row()))
    same = Policy.load(write(tmp_path / "b.json", row()))
    other = Policy.load(write(tmp_path / "c.json", row((8192, "one_shot_push"), (None, "nccl"))))
    assert one.digest() == same.digest() != other.digest()
    assert Policy().digest() not in (one.digest(), other.digest())


def test_the_digest_follows_the_heuristic(monkeypatch):
    """Ranks of two versions of the library must not agree by accident."""
    before = Policy().digest()
    monkeypatch.setattr(policy, "PUSH_PCIE", 32 << 10)
    assert Policy().digest() != before


# -- bad files


@pytest.mark.parametrize(
    "text, message",
    (
        ("", "is not JSON"),
        ('{"schema": 2, "rows": []}', "schema is 2; this version reads schema 1"),
        ('{"schema": 1}', "rows: expected a list, got None"),
        ('{"schema": 1, "rows": [3]}', "row 0: expected a JSON object, got int"),
    ),
)
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^table: .*t.json.*{message}"):
        Policy.load(str(path))


NCCL_LAST = {"max_bytes": None, "algo": "nccl"}
PUSH = {"max_bytes": 64, "algo": "one_shot_push"}


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"world_size": 1}, "world_size: got 1; expected one of 2, 3"),
        ({"world_size": True}, "world_size: got True"),
        ({"world_size": "2"}, "world_size: got '2'"),
        ({"link": "ib"}, "link: got 'ib'; expected one of nvlink, pcie, virtual"),
        ({"mode": "both"}, "mode: got 'both'; expected one of eager, graph"),
        ({"nccl": None}, "nccl: got None"),
        ({"thresholds": []}, "thresholds: expected at least one"),
        ({"thresholds": [3]}, r"thresholds\[0\]: expected an object"),
        ({"thresholds": [PUSH]}, r"thresholds\[0\].max_bytes: got 64; null belongs in the last"),
        ({"thresholds": [NCCL_LAST, NCCL_LAST]}, r"thresholds\[0\].max_bytes: got None; null belongs in the last"),
        ({"thresholds": [PUSH, PUSH, NCCL_LAST]}, r"thresholds\[1\].max_bytes: got 64; expected an integer above 64"),
        ({"thresholds": [{**PUSH, "max_bytes": 0}, NCCL_LAST]}, r"thresholds\[0\].max_bytes: got 0"),
        ({"thresholds": [{**PUSH, "max_bytes": None}]}, r"thresholds\[0\]: one_shot_push needs a max_bytes"),
        ({"thresholds": [{**PUSH, "max_bytes": True}, NCCL_LAST]}, r"thresholds\[0\].max_bytes: got True"),
        ({"thresholds": [{**PUSH, "algo": "ring"}, NCCL_LAST]}, r"thresholds\[0\].algo: got 'ring'; expected one of"),
        ({"link": "virtual"}, r"thresholds\[1\].algo: got 'nccl'; .*\(link virtual\)"),
    ),
)
def test_a_bad_row_is_named_by_number_and_field(tmp_path, changes, message):
    path = write(tmp_path / "t.json", row(), {**row(), **changes})
    with pytest.raises(ValueError, match=f"^table: .*t.json: row 1: {message}"):
        Policy.load(path)


def test_a_row_without_a_field_is_named(tmp_path):
    for name in row():
        path = write(tmp_path / f"{name}.json", {k: v for k, v in row().items() if k != name})
        with pytest.raises(ValueError, match=f"row 0: {name}: missing"):
            Policy.load(path)


def test_a_missing_file_is_an_error_where_it_was_named(tmp_path, monkeypatch):
    missing = str(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="^table: cannot read .*nowhere.json"):
        Policy.load(missing)
    monkeypatch.setenv(policy.ENVIRONMENT, missing)
    with pytest.raises(ValueError, match="cannot read"):
        Policy.load()


def test_the_packaged_table_is_sound(monkeypatch):
    monkeypatch.undo()
    if policy.PACKAGED.is_file():
        table = policy.Table.load(str(policy.PACKAGED))
        keys = [(one.arch, one.link, one.world_size, one.mode) for one in table.rows]
        assert keys and len(keys) == len(set(keys)), "a second row for the same key is never reached"
    assert Policy.load().tables == ((table,) if policy.PACKAGED.is_file() else ())


def test_no_torch():
    code = "import sys, extend_attn.comm.policy as p; p.Policy.load(); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(policy.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)


# -- explain


@pytest.mark.parametrize(
    "text, nbytes", (("4096", 4096), ("64KiB", 65536), ("1 mib", 1 << 20), ("2GiB", 2 << 30), ("0B", 0))
)
def test_bytes_as_text(text, nbytes):
    assert parse_bytes(text) == nbytes == parse_bytes(format_bytes(nbytes))


@pytest.mark.parametrize("text", ("", "KiB", "1.5MiB", "64 KB", "-4096"))
def test_bytes_that_are_none(text):
    with pytest.raises(ValueError, match="^bytes: got "):
        parse_bytes(text)


def test_explain_shows_all_sizes_of_both_modes(tmp_path, capsys):
    path = write(tmp_path / "t.json", row((4096, "one_shot_push"), (1 << 20, "two_shot_pull"), (None, "nccl")))
    assert main(["explain", "all-reduce", "--world-size", "2", "--table", path]) == 0
    shown = [line.split("  ") for line in capsys.readouterr().out.splitlines() if line.startswith(("eager", "graph"))]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in shown]
    assert cells[-3:] == [
        ["graph", "up to 4 KiB", "one_shot_push", "table:t.json#0"],
        ["graph", "up to 1 MiB", "two_shot_pull", "table:t.json#0"],
        ["graph", "above 1 MiB", "nccl", "table:t.json#0"],
    ]
    assert {line[0] for line in cells[:-3]} == {"eager"} and {line[-1] for line in cells[:-3]} == {"heuristic"}


def test_explain_one_size_as_json(capsys):
    words = ["--world-size", "4", "--bytes", "1MiB", "--link", "nvlink", "--arch", "sm_90", "--mode", "graph", "--json"]
    assert main(["explain", "all-reduce", *words]) == 0
    expected = [{"mode": "graph", "bytes": 1 << 20, "algo": "two_shot_pull", "source": "heuristic"}]
    assert json.loads(capsys.readouterr().out) == expected


@pytest.mark.parametrize(
    "words, said",
    (
        (["--world-size", "9"], "world_size: got 9"),
        (["--world-size", "2", "--bytes", "much"], "bytes: got 'much'"),
        (["--world-size", "2", "--table", "/nowhere.json"], "cannot read /nowhere.json"),
    ),
)
def test_explain_wrong_usage(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["explain", "all-reduce", *words])
    assert stopped.value.code == 2 and said in capsys.readouterr().err
