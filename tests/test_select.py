"""The choice of a plan: what is legal everywhere, what the defaults are, and what a caller may ask for instead."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_problems import ARCHITECTURES, CHUNK, H200, PREFILL, VERIFY

from extend_attn.plan import (
    DeviceSpec,
    Plan,
    Tile,
    candidates,
    explain,
    illegal,
    select,
    shared_memory_bytes,
    step_down,
    sweep12,
)
from extend_attn.plan.candidates import fitting, shrinking
from extend_attn.plan.heuristics import MIN_SPLIT_KEYS, SPLIT_MAX, heuristic, plain_family
from extend_attn.plan.select import forget
from extend_attn.problem import Problem


@pytest.fixture(autouse=True)
def no_table_of_this_machine(monkeypatch, tmp_path):
    """Neither the tester's own table nor the packaged one may decide these tests (test_tables.py is about them)."""
    monkeypatch.delenv("EXTEND_ATTN_TABLE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no config"))
    monkeypatch.setattr("extend_attn.plan.tables.PACKAGED", tmp_path / "no tables")
    forget()
    yield
    forget()


# -- the default choice

SHAPES = tuple(
    itertools.product(
        ("bfloat16", "float32"),
        ((16, 16), (64, 64), (128, 128), (192, 128), (256, 256), (512, 512), (576, 512)),
        (1, 16, 1024),  # new tokens
        (1, 3, 128),  # heads that share a KV head
        (1, 32),  # sequences
    )
)
# The kernels multiply 16 rows by 16 keys at least, which in fp32 takes 68 KiB at these head dims; a block has 64.
TOO_LARGE = {(arch, "float32", (576, 512)) for arch in ("sm_75", "hip")}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_problem_has_a_legal_plan_on_every_device(arch):
    device = DeviceSpec.preset(arch)
    for dtype, dims, new, group, batch in SHAPES:
        for kv_dtype in ("", "float8_e5m2"):
            problem = Problem(
                dtype, *dims, 2 * group, 2, batch, batch * new, new, batch * 4000, kv_dtype=kv_dtype, alignment=2
            )
            if (arch, dtype, dims) in TOO_LARGE:
                with pytest.raises(NotImplementedError, match="^plan: no tile fits head dims .* in float32 on"):
                    select(problem, device)
                continue
            plan = select(problem, device)
            assert illegal(problem, plan, device) is None, (problem, plan)
            assert plan.source in ("heuristic", "sglang", "sglang-legacy")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_stepping_down_ends_and_shrinks(arch):
    device = DeviceSpec.preset(arch)
    for dtype, dims, new, group, batch in SHAPES[::3]:
        problem = Problem(dtype, *dims, 2 * group, 2, batch, batch * new, new, batch * 4000)
        plan = heuristic(problem, device)
        steps = 0
        while True:
            smaller = step_down(problem, plan, device)
            if smaller is None:
                break
            assert illegal(problem, smaller, device) is None
            if smaller.family == plan.family:
                assert shared_memory_bytes(problem, smaller, device) < shared_memory_bytes(problem, plan, device)
                assert smaller.split_kv == plan.split_kv
            else:  # the last of a Hopper family
                least = {"hopper_tiled": (128, 64), "hopper_packed": (16, 64)}[plan.family]
                assert (max(16, plan.tile.block_m), plan.tile.block_n) == least and plan.tile.num_stages <= 2
                assert smaller == fitting(problem, heuristic(problem, device, plain_family(problem)), device)
            plan, steps = smaller, steps + 1
        assert steps < 20 and not plan.hopper
        assert illegal(problem, plan, device) or (plan.tile.block_m, plan.tile.block_n) == (16, 16)


def test_what_is_explained_for_a_hopper_family_has_its_rows():
    assert all(p.tile.block_m == 128 for p in shrinking(PREFILL, heuristic(PREFILL, H200, "hopper_tiled"), H200))


def test_shrinking_gives_up_stages_then_keys_then_rows_then_the_pipeline():
    tiles = [str(p.tile) for p in shrinking(PREFILL, Plan("tiled", Tile(32, 64, 4, 3)), H200)]
    assert tiles == ["32x64 w4 s2", "32x32 w4 s2", "16x32 w4 s2", "16x16 w4 s2", "16x16 w4 s1"]


@pytest.mark.parametrize("new, family", ((0, "packed"), (1, "packed"), (16, "packed"), (17, "tiled"), (8192, "tiled")))
def test_the_family_follows_the_new_tokens(new, family):
    assert select(replace(VERIFY, max_len_extend=new), H200).family == family


def test_rows_fill_the_packed_tile():
    for group, new, block_m in ((1, 1, 16), (2, 8, 16), (2, 16, 32), (3, 4, 16), (5, 4, 32), (7, 8, 64)):
        problem = replace(VERIFY, head_dim_qk=128, head_dim_v=128, num_q_heads=4 * group, max_len_extend=new)
        assert select(problem, H200).tile.block_m == block_m, (group, new)


def test_a_large_accumulator_is_spread_over_eight_warps():
    for head_dim, kv_heads, num_warps in ((256, 4, 4), (192, 2, 8), (128, 2, 4)):
        problem = replace(VERIFY, head_dim_qk=head_dim, head_dim_v=head_dim, num_kv_heads=kv_heads, max_len_extend=16)
        plan = select(replace(problem, batch_size=4), H200)
        assert plan.family == "packed" and plan.tile.num_warps == num_warps, (head_dim, plan)


def test_fp32_tiles_stay_small():
    for problem in (VERIFY, PREFILL):
        for head_dim in (64, 128, 256, 512):
            tile = select(replace(problem, dtype="float32", kv_dtype="", out_dtype="", head_dim_qk=head_dim), H200).tile
            assert tile.block_m <= 32 and tile.block_n == 16


def test_splits_fill_the_gpu_and_never_get_too_short():
    one = replace(VERIFY, batch_size=1, num_tokens=4, num_kv_indices=8000)
    assert select(one, H200).split_kv == 132 // 4
    assert select(replace(one, max_len_prefix=512), H200).split_kv == 512 // MIN_SPLIT_KEYS
    assert select(replace(one, sliding_window=1023), H200).split_kv == 1024 // MIN_SPLIT_KEYS
    assert select(replace(one, num_kv_indices=100), H200).split_kv == 1
    assert select(replace(one, num_kv_indices=0), H200).split_kv == 1
    assert select(replace(one, num_kv_indices=1 << 40), H200).split_kv == 132 // 4  # a preallocated array
    assert select(replace(one, num_q_heads=1, num_kv_heads=1), H200).split_kv == SPLIT_MAX
    assert select(VERIFY, H200).split_kv == 1  # 128 pairs fill 132 SMs
    assert select(replace(VERIFY, kv_dtype="float8_e4m3fn"), H200).split_kv == 2  # conversion binds: two a SM
    large = replace(VERIFY, head_dim_qk=512, head_dim_v=512, num_kv_heads=2)
    assert select(large, H200).split_kv == 2  # 64 pairs, and no more than one program a SM
    assert select(replace(VERIFY, sliding_window=1023), H200).split_kv == 1
    eight = select(replace(VERIFY, batch_size=8), H200).split_kv
    assert 132 <= 8 * 4 * eight <= 2 * 132


def test_the_combine_of_splits_starts_early_where_the_architecture_can():
    one = replace(VERIFY, batch_size=1, num_tokens=4, num_kv_indices=8000)
    assert select(one, H200).pdl and not select(VERIFY, H200).pdl
    assert not select(one, DeviceSpec.preset("a100")).pdl


def test_large_blocks_where_they_fill_the_gpu_or_a_prefix_is_read():
    few, many = replace(PREFILL, num_tokens=1000, max_len_extend=1000), PREFILL
    assert select(few, H200).tile.block_m < select(many, H200).tile.block_m == 128
    assert select(CHUNK, H200).tile.block_m == 128


def test_heads_share_a_tile_only_where_a_prefix_is_gathered():
    assert not select(PREFILL, H200).pack_gqa
    assert select(CHUNK, H200).pack_gqa
    assert not select(replace(CHUNK, num_q_heads=12), H200).pack_gqa  # three heads do not divide a tile
    assert not select(replace(CHUNK, num_q_heads=4), H200).pack_gqa


def test_new_keys_come_through_tma_where_that_serves():
    assert select(PREFILL, H200).tma and select(CHUNK, H200).tma
    assert not select(PREFILL, DeviceSpec.preset("a100")).tma
    for fields in ({"custom_mask": True}, {"unified": True, "num_kv_indices": 8192}, {"alignment": 8}):
        assert not select(replace(PREFILL, **fields), H200).tma
    assert not select(PREFILL, replace(H200, triton="3.3.1")).tma


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 64), st.integers(1, 40), st.integers(0, 10**6), st.sampled_from(ARCHITECTURES))
def test_problems_of_one_key_get_one_plan_whoever_asks_first(batch, new, indices, arch):
    device = DeviceSpec.preset(arch)
    problem = replace(VERIFY, batch_size=batch, num_tokens=batch * new, max_len_extend=new, num_kv_indices=indices)
    forget()
    direct = select(problem, device)
    forget()
    assert select(problem.bucketed(), device) == direct
    assert select(problem, device) == direct


def test_a_repeated_choice_is_remembered():
    assert select(VERIFY, H200) is select(replace(VERIFY, batch_size=31), H200)


# -- explicit plans


def test_an_explicit_plan_is_taken_as_it_is():
    plan = Plan("packed", Tile(32, 64, 8, 2), split_kv=3, pdl=True, source="mine")
    chosen = select(VERIFY, H200, plan=plan)
    assert chosen == plan and chosen.source == "explicit"


def test_a_partial_plan_takes_the_rest_from_the_default():
    default = select(VERIFY, H200)
    assert select(VERIFY, H200, plan={"split_kv": 5}) == replace(default, split_kv=5)
    tile = select(VERIFY, H200, plan={"tile": {"num_stages": 2}}).tile
    assert tile == replace(default.tile, num_stages=2)
    assert select(VERIFY, H200, plan={"tile": (32, 16)}).tile == replace(default.tile, block_m=32, block_n=16)
    assert select(VERIFY, H200, plan={"tile": [32, 16, 8, 2]}).tile == Tile(32, 16, 8, 2)
    assert select(VERIFY, H200, plan={}) == default
    assert select(VERIFY, H200, plan={"split_kv": 5}).source == "explicit"


def test_a_family_brings_its_own_defaults():
    tiled = select(VERIFY, H200, plan={"family": "tiled"})
    assert (tiled.family, tiled.split_kv) == ("tiled", 1)
    assert tiled.tile == heuristic(VERIFY, H200, "tiled").tile
    packed = select(CHUNK, H200, plan={"family": "packed"})
    assert packed.family == "packed" and not packed.pack_gqa


def test_tile_is_short_for_a_plan_with_a_tile():
    for tile in (Tile(32, 64, 8, 2), {"block_m": 32, "block_n": 64, "num_warps": 8, "num_stages": 2}, (32, 64, 8, 2)):
        assert select(VERIFY, H200, tile=tile) == select(VERIFY, H200, plan={"tile": tile})
    chosen = select(VERIFY, H200, plan={"split_kv": 2}, tile=(16, 64))
    assert (chosen.split_kv, chosen.tile.block_n) == (2, 64)
    chosen = select(CHUNK, H200, plan="sglang", tile={"num_stages": 1})
    assert (chosen.tile, chosen.pack_gqa) == (Tile(32, 64, 4, 1), False)


@pytest.mark.parametrize("plan", (Plan("tiled", Tile(64, 64)), {"tile": (64, 64)}))
def test_one_tile_is_enough(plan):
    with pytest.raises(ValueError, match="^tile: .* already names its tile"):
        select(VERIFY, H200, plan=plan, tile=(32, 32))


@pytest.mark.parametrize(
    "arguments, error, message",
    (
        ({"plan": "fastest"}, ValueError, "^plan: got 'fastest'; selectors are sglang, .*, table:PATH"),
        ({"plan": "table:"}, ValueError, "^plan: got 'table:'"),
        ({"plan": 3}, TypeError, "^plan: got 3"),
        ({"plan": [1, 2]}, TypeError, "^plan: got "),
        ({"plan": {"tiles": 3}}, ValueError, "^plan: unknown field tiles"),
        ({"plan": {"tile": {"m": 16}}}, ValueError, "^tile: unknown field m"),
        ({"plan": {"tile": {1, 2}}}, TypeError, "^tile: got "),
        ({"plan": {"family": "fused"}}, ValueError, "^family: got 'fused'"),
        ({"tile": (16,)}, TypeError, "^tile: got "),
        ({"tile": "16x16"}, TypeError, "^tile: got "),
        ({"tile": (16, 24)}, ValueError, "^block_n: got 24"),
        ({"tile": (256, 256, 8, 8)}, ValueError, "^plan: .*registers: "),
        ({"plan": {"split_kv": 4, "family": "tiled"}}, ValueError, "^plan: .*split_kv: 4; only the packed family"),
    ),
)
def test_what_an_explicit_choice_may_not_be(arguments, error, message):
    for _ in range(2):  # a refused choice is not remembered as a good one
        with pytest.raises(error, match=message):
            select(VERIFY, H200, **arguments)


def test_a_named_selector_that_cannot_run_says_so():
    small = replace(H200, shared_memory=64 * 1024)
    with pytest.raises(ValueError, match="^plan: .*shared memory"):
        select(replace(VERIFY, head_dim_qk=512, head_dim_v=512), small, plan="sglang")


def test_the_heuristic_by_name():
    plan = select(CHUNK, DeviceSpec.preset("sm_86"), plan="heuristic")
    assert plan.source == "heuristic" and illegal(CHUNK, plan, DeviceSpec.preset("sm_86")) is None


# -- candidates and explanations


def test_candidates_are_distinct_and_begin_with_the_preference():
    for problem in (VERIFY, PREFILL, CHUNK):
        found = candidates(problem, H200)
        assert len(found) == len(set(found)) > 8
        assert found[0] == heuristic(problem, H200)
        assert {"sglang", "sglang-legacy"} <= {plan.source for plan in found}


def test_the_sweep_holds_twelve_tiles_and_the_published_ones():
    tiles = [plan.tile for plan in sweep12()]
    assert len(tiles) == len(set(tiles)) == 12
    assert {Tile(128, 64, 8, 1), Tile(32, 64, 4, 2), Tile(16, 64, 4, 2)} <= set(tiles)
    assert {(p.family, p.pack_gqa, p.split_kv) for p in sweep12()} == {("tiled", False, 1)}


def test_an_explanation_shows_candidates_reasons_and_choice():
    device = DeviceSpec.preset("sm_86")
    found = explain(CHUNK, device)
    assert found.choice == select(CHUNK, device)
    assert [row.plan for row in found.rows] == candidates(CHUNK, device)
    assert {row.legal for row in found.rows} == {False, True}
    assert all(row.legal == (illegal(CHUNK, row.plan, device) is None) for row in found.rows)

    lines = str(found).splitlines()
    marked = [line for line in lines if line.startswith("->")]
    assert len(marked) == 1 and str(found.choice) in marked[0]
    assert "NVIDIA GeForce RTX 3090 (sm_86, 82 SMs" in lines[1]
    assert any("no: shared memory: about" in line for line in lines)
    assert lines[-1] == f"choice   {found.choice}  (source: heuristic)"

    data = json.loads(json.dumps(found.to_json()))
    assert Problem.from_json(data["problem"]) == CHUNK
    assert Plan.from_json(data["choice"]) == found.choice
    assert [row["legal"] for row in data["candidates"]] == [row.legal for row in found.rows]
    assert all((row["reason"] is None) == row["legal"] for row in data["candidates"])


def test_an_explanation_of_an_explicit_plan_puts_it_first():
    found = explain(VERIFY, H200, plan={"split_kv": 7})
    assert found.rows[0].plan == found.choice and found.rows[0].source == "explicit"
    assert explain(VERIFY, H200, plan="sglang").choice.source == "sglang"
    five = explain(replace(VERIFY, batch_size=5), H200, plan="sglang")  # five is in the bucket of eight
    assert [row.plan.tile for row in five.rows if row.source == "sglang"] == [Tile(32, 64, 4, 2)]
    with pytest.raises(ValueError, match="shared memory"):
        explain(VERIFY, H200, tile=(64, 128, 8, 8))


def test_an_explanation_names_what_is_out_of_the_ordinary():
    special = replace(VERIFY, kv_dtype="float8_e5m2", is_causal=False, custom_mask=True, sliding_window=1023)
    text = str(explain(replace(special, logit_cap=30.0, alignment=8), H200))
    for part in ("KV float8_e5m2", "not causal", "custom_mask", "window 1023", "cap 30", "aligned to 8 bytes"):
        assert part in text
        assert part not in str(explain(VERIFY, H200))
