"""Measured tables: which row speaks for a problem, whose table comes first, and what a bad file is told."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
from plan_problems import H200, PREFILL, VERIFY

from extend_attn.plan import DeviceSpec, Plan, Tile, explain, select, tables
from extend_attn.plan.select import forget

H100 = DeviceSpec.preset("h100")
DEFAULT = "heuristic"


@pytest.fixture(autouse=True)
def nobody_has_a_table(monkeypatch, tmp_path):
    """No packaged rows, no variable, an empty config folder; and nothing remembered from another test."""
    packaged = tmp_path / "packaged"
    packaged.mkdir()
    monkeypatch.setattr(tables, "PACKAGED", packaged)
    monkeypatch.setattr(tables, "user_folder", lambda: tmp_path / "config")
    monkeypatch.delenv(tables.ENVIRONMENT, raising=False)
    forget()
    yield
    forget()


def row(split_kv, *, problem=VERIFY, device="NVIDIA H200", sm_count=132, triton="3.6.0", plan=None, **more):
    """A row that can be told from others by its number of splits."""
    chosen = plan or Plan("packed", Tile(16, 64, 8, 3), split_kv=split_kv)
    return {
        "device": device,
        "sm_count": sm_count,
        "triton": triton,
        "date": "2026-11-24",
        "command": "python -m extend_attn bench attention --candidates",
        "problem": problem.to_json(),
        "plan": chosen.to_json(),
        "us": 34.1,
        **more,
    }


def write(path, *rows, **top):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": 1, "arch": "sm_90", "rows": list(rows), **top}))
    return str(path)


# -- which row


def test_a_row_of_the_same_device_then_of_as_many_sms_then_of_the_architecture(tmp_path):
    path = write(
        tmp_path / "t.json",
        row(2, device="NVIDIA GH200", sm_count=144),
        row(3, device="NVIDIA H800", sm_count=132),
        row(4, device="NVIDIA H200", sm_count=132),
    )
    assert select(VERIFY, H200, table=path).split_kv == 4
    assert select(VERIFY, H100, table=path).split_kv == 3
    assert select(VERIFY, replace(H100, sm_count=114), table=path).split_kv == 2
    assert select(VERIFY, DeviceSpec.preset("b200"), table=path).source == DEFAULT
    # another architecture with as many SMs is no relative
    assert select(VERIFY, DeviceSpec.preset("b200", sm_count=132), table=path).source == DEFAULT


def test_a_table_that_names_no_architecture_speaks_for_devices_and_sm_counts(tmp_path):
    path = write(tmp_path / "t.json", row(3, device="NVIDIA H200", sm_count=132), arch=None)
    assert select(VERIFY, H200, table=path).split_kv == 3
    assert select(VERIFY, H100, table=path).split_kv == 3
    assert select(VERIFY, replace(H100, sm_count=114), table=path).source == DEFAULT


def test_the_source_names_the_table_and_the_row(tmp_path):
    path = write(tmp_path / "mine.json", row(2, device="NVIDIA B200"), row(5))
    assert select(VERIFY, H200, table=path).source == "table:mine.json#1"


def test_the_nearest_sizes_win(tmp_path):
    path = write(
        tmp_path / "t.json",
        row(2, problem=replace(VERIFY, batch_size=16)),
        row(3),
        row(4, problem=replace(VERIFY, batch_size=64)),
    )
    for batch, expected in ((16, 2), (32, 3), (25, 3), (64, 4)):
        problem = replace(VERIFY, batch_size=batch, num_kv_indices=batch * 8000)
        assert select(problem, H200, table=path).split_kv == expected, batch
    for batch in (8, 128):  # splits that fill the GPU for one batch size do not for another
        problem = replace(VERIFY, batch_size=batch, num_kv_indices=batch * 8000)
        assert select(problem, H200, table=path).source == DEFAULT, batch


def test_a_row_that_confirms_the_heuristic_speaks_for_its_own_sizes(tmp_path):
    """What changes with the sizes of a problem near it, the heuristic knows."""
    path = write(tmp_path / "t.json", row(3, own=True))
    near = replace(VERIFY, num_kv_indices=VERIFY.num_kv_indices * 2)
    assert select(VERIFY, H200, table=path).split_kv == 3
    assert select(near, H200, table=path).source == DEFAULT
    assert select(near, H200, table=write(tmp_path / "other.json", row(3, own=False))).split_kv == 3


def test_a_row_without_splits_speaks_for_larger_batches(tmp_path):
    path = write(tmp_path / "t.json", row(1))
    for batch, source in ((16, DEFAULT), (32, "table:t.json#0"), (64, "table:t.json#0"), (128, DEFAULT)):
        problem = replace(VERIFY, batch_size=batch, num_kv_indices=batch * 8000)
        assert select(problem, H200, table=path).source == source, batch


@pytest.mark.parametrize(
    "changes",
    (
        {"batch_size": 128, "num_kv_indices": 1024000},  # two octaves away
        {"batch_size": 4, "num_kv_indices": 32000},
        {"num_q_heads": 16},
        {"head_dim_v": 128},
        {"dtype": "float16", "kv_dtype": "", "out_dtype": ""},
        {"kv_dtype": "float8_e4m3fn"},
        {"sliding_window": 1023},
        {"num_kv_indices": 0},
        {"max_len_prefix": 500},
        {"max_len_extend": 16},  # 32 rows, where the row has 16
        {"max_len_extend": 512},
        {"v_aliases_k_pool": True},
    ),
)
def test_a_row_says_nothing_about(tmp_path, changes):
    path = write(tmp_path / "t.json", row(3))
    assert select(replace(VERIFY, **changes), H200, table=path).source == DEFAULT


@pytest.mark.parametrize(
    "changes",
    (
        {"batch_size": 27, "num_tokens": 108, "num_kv_indices": 200000},
        {"num_kv_indices": 32 * 131072},  # preallocated: the true lengths are unknown
        {"num_kv_indices": 32 * 2049},
        {"max_len_extend": 8},  # 16 rows, the same tile
        {"max_len_extend": 1},
        {"num_q_heads": 4, "num_kv_heads": 2, "batch_size": 64, "num_kv_indices": 512000},  # one rank of two
        {"custom_mask": True},
        {"sinks": True, "return_lse": True, "logit_cap": 30.0, "index_dtype": "int32", "alignment": 8},
    ),
)
def test_a_row_speaks_for(tmp_path, changes):
    path = write(tmp_path / "t.json", row(3))
    assert select(replace(VERIFY, **changes), H200, table=path).split_kv == 3


def test_long_extends_match_within_an_octave(tmp_path):
    plan = Plan("tiled", Tile(64, 32, 4, 2))
    path = write(tmp_path / "t.json", row(1, problem=PREFILL, plan=plan))
    for new, found in ((2048, False), (4096, True), (8192, True), (16384, True), (32768, False)):
        problem = replace(PREFILL, max_len_extend=new, num_tokens=new)
        assert (select(problem, H200, table=path).source != DEFAULT) == found, new


def test_among_equals_the_same_mask_then_the_same_triton_then_the_first(tmp_path):
    path = write(
        tmp_path / "t.json",
        row(2, problem=replace(VERIFY, custom_mask=True), triton="3.7.1"),
        row(3, triton="3.6.0"),
        row(4, triton="3.7.0"),
        row(5, triton="3.7.1"),
    )
    assert select(replace(VERIFY, custom_mask=True), H200, table=path).split_kv == 2
    assert select(VERIFY, H200, table=path).split_kv == 3
    assert select(VERIFY, replace(H200, triton="3.7.1"), table=path).split_kv == 4
    assert select(VERIFY, replace(H200, triton="3.6.2"), table=path).split_kv == 3


def test_an_illegal_row_is_passed_over(tmp_path):
    too_large = Plan("packed", Tile(16, 256, 4, 4), split_kv=9)
    path = write(tmp_path / "t.json", row(9, plan=too_large), row(2, device="NVIDIA H100 80GB HBM3"))
    assert select(VERIFY, H200, table=path).split_kv == 2
    found = explain(VERIFY, H200, table=path)
    assert (found.rows[0].source, found.rows[0].legal) == ("table:t.json#0", False)
    assert "shared memory" in found.rows[0].reason
    assert found.choice.source == "table:t.json#1"


# -- whose table


def test_the_order(tmp_path, monkeypatch):
    write(tables.PACKAGED / "sm_90.json", row(2))
    assert select(VERIFY, H200).source == "table:sm_90.json#0"
    assert select(VERIFY, H200, plan="heuristic").source == "heuristic"

    write(tmp_path / "config" / "table.json", row(3))
    forget()
    assert (select(VERIFY, H200).split_kv, select(VERIFY, H200).source) == (3, "table:table.json#0")

    monkeypatch.setenv(tables.ENVIRONMENT, write(tmp_path / "environment.json", row(4)))
    assert select(VERIFY, H200).split_kv == 4  # no forget(): the variable is looked at in every call

    argument = write(tmp_path / "argument.json", row(5))
    assert select(VERIFY, H200, table=argument).split_kv == 5
    assert select(VERIFY, H200, plan="table:" + argument).source == "table:argument.json#0"

    chosen = select(VERIFY, H200, table=argument, plan={"split_kv": 6})
    assert (chosen.split_kv, chosen.tile, chosen.source) == (6, Tile(16, 64, 8, 3), "explicit")  # the rest is the row's
    assert select(VERIFY, H200, table=argument, plan="sglang").source == "sglang"


def test_what_the_users_table_does_not_cover_goes_on_to_the_packaged_one(tmp_path):
    write(tables.PACKAGED / "sm_90.json", row(2))
    mine = write(tmp_path / "mine.json", row(1, problem=PREFILL, plan=Plan("tiled", Tile(64, 32))))
    assert select(VERIFY, H200, table=mine).source == "table:sm_90.json#0"
    assert select(PREFILL, H200, table=mine).source == "table:mine.json#0"
    assert select(replace(PREFILL, head_dim_v=64), H200, table=mine).source == DEFAULT


def test_a_row_of_the_users_table_beats_a_nearer_one_of_the_package(tmp_path):
    write(tables.PACKAGED / "sm_90.json", row(2))
    far = replace(VERIFY, num_kv_indices=32 * 4000)
    mine = write(tmp_path / "mine.json", row(3, problem=far, device="NVIDIA H800"))
    assert select(VERIFY, H200, table=mine).split_kv == 3


def test_explain_reads_the_same_tables(tmp_path):
    path = write(tmp_path / "t.json", row(5))
    for found in (explain(VERIFY, H200, table=path), explain(VERIFY, H200, plan="table:" + path)):
        assert found.choice == found.rows[0].plan
        assert found.choice.source == found.rows[0].source == "table:t.json#0"


# -- the config folder


def test_the_config_folder_follows_xdg_without_platformdirs(monkeypatch, tmp_path):
    monkeypatch.undo()  # the true user_folder
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert tables.user_folder() == tmp_path / "extend_attn"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tables.user_folder() == tmp_path / "home" / ".config" / "extend_attn"


def test_a_table_in_the_config_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.delenv(tables.ENVIRONMENT, raising=False)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert tables.user_table_path() is None
    path = write(tmp_path / "extend_attn" / "table.json", row(7))
    forget()
    assert tables.user_table_path() == path
    assert select(VERIFY, H200).split_kv == 7


# -- bad files


@pytest.mark.parametrize(
    "text, message",
    (
        ("", "is not JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"rows": []}', "schema is None; this version reads schema 1"),
        ('{"schema": 2, "rows": []}', "schema is 2; this version reads schema 1"),
        ('{"schema": 1}', "rows: expected a list, got None"),
        ('{"schema": 1, "arch": 90, "rows": []}', "arch: got 90"),
        ('{"schema": 1, "rows": [3]}', "row 0: expected a JSON object, got int"),
    ),
)
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^table: .*t.json.*{message}"):
        select(VERIFY, H200, table=str(path))


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"us": 0}, "us: got 0"),
        ({"us": "34"}, "us: got '34'"),
        ({"us": True}, "us: got True"),
        ({"sm_count": 132.0}, "sm_count: got 132.0"),
        ({"device": None}, "device: got None"),
        ({"own": "yes"}, "own: got 'yes'"),
        ({"problem": {"dtype": "bfloat16"}}, "problem: missing field head_dim_qk"),
        ({"problem": {**VERIFY.to_json(), "dtype": "int8"}}, "dtype: got 'int8'"),
        ({"plan": {"family": "packed"}}, "plan: missing field tile"),
        ({"plan": {"family": "packed", "tile": {"block_m": 16, "block_n": 24}}}, "block_n: got 24"),
    ),
)
def test_a_bad_row_is_named_by_number_and_field(tmp_path, changes, message):
    path = write(tmp_path / "t.json", row(1), {**row(2), **changes})
    with pytest.raises(ValueError, match=f"^table: .*t.json: row 1: {message}"):
        select(VERIFY, H200, table=path)


def test_a_row_without_a_field_is_named(tmp_path):
    for name in ("device", "sm_count", "triton", "date", "command", "problem", "plan", "us"):
        path = write(tmp_path / f"{name}.json", {k: v for k, v in row(1).items() if k != name})
        with pytest.raises(ValueError, match=f"row 0: {name}: missing"):
            select(VERIFY, H200, table=path)


def test_a_missing_file_is_an_error_where_it_was_named(tmp_path, monkeypatch):
    missing = str(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="^table: cannot read .*nowhere.json: No such file"):
        select(VERIFY, H200, table=missing)
    with pytest.raises(ValueError, match="cannot read"):
        select(VERIFY, H200, plan="table:" + missing)
    monkeypatch.setenv(tables.ENVIRONMENT, missing)
    with pytest.raises(ValueError, match="cannot read"):
        select(VERIFY, H200)
    assert select(VERIFY, H200, plan="heuristic").source == "heuristic"  # which reads no table


def test_the_packaged_tables_are_sound(monkeypatch):
    monkeypatch.undo()
    paths = sorted(tables.PACKAGED.glob("*.json"))
    assert [path.name for path in paths] and "sm_90.json" in [path.name for path in paths]
    for path in paths:
        table = tables.load(str(path))
        assert table.arch == path.stem
        device = DeviceSpec.preset(table.arch)
        for number, measured in enumerate(table.rows):
            own = replace(device, name=measured.device, sm_count=measured.sm_count, triton=measured.triton)
            alone = tables.Table(table.name, table.arch, (measured,))
            assert list(alone.matches(measured.problem.bucketed(), own)) == [measured.plan], (path.name, number)
