"""Tiles, plans and devices as values, and what can run where."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_problems import CHUNK, H200, PREFILL, VERIFY

from extend_attn.plan import (
    DeviceSpec,
    Plan,
    Tile,
    illegal,
    select,
    shared_memory_bytes,
)

# -- tiles and plans as values


@pytest.mark.parametrize(
    "fields, name",
    (
        ({"block_m": 4}, "block_m"),
        ({"block_m": 48}, "block_m"),
        ({"block_n": 512}, "block_n"),
        ({"num_warps": 3}, "num_warps"),
        ({"num_warps": 64}, "num_warps"),
        ({"num_stages": 0}, "num_stages"),
        ({"num_stages": 9}, "num_stages"),
    ),
)
def test_a_tile_refuses(fields, name):
    with pytest.raises(ValueError, match=f"^{name}: got {fields[name]}"):
        Tile(**{"block_m": 64, "block_n": 64, **fields})
    with pytest.raises(TypeError, match=f"^{name}: "):
        Tile(**{"block_m": 64, "block_n": 64, name: float(fields[name])})


@pytest.mark.parametrize(
    "fields, error, name",
    (
        ({"family": "fused"}, ValueError, "family"),
        ({"split_kv": 0}, ValueError, "split_kv"),
        ({"split_kv": 4096}, ValueError, "split_kv"),
        ({"split_kv": 2.0}, TypeError, "split_kv"),
        ({"tile": (64, 64)}, TypeError, "tile"),
        ({"pdl": 1}, TypeError, "pdl"),
        ({"source": None}, TypeError, "source"),
    ),
)
def test_a_plan_refuses(fields, error, name):
    with pytest.raises(error, match=f"^{name}: got "):
        Plan(**{"family": "packed", "tile": Tile(16, 32), **fields})


def test_plans_are_equal_whoever_chose_them():
    one, other = (Plan("tiled", Tile(64, 64), source=source) for source in ("heuristic", "explicit"))
    assert one == other and hash(one) == hash(other)
    assert one != replace(one, pack_gqa=True)


blocks = st.sampled_from((16, 32, 64, 128, 256))
tiles = st.builds(Tile, blocks, blocks, st.sampled_from((1, 2, 4, 8, 16, 32)), st.integers(1, 8))
plans = st.builds(
    Plan,
    st.sampled_from(("tiled", "packed")),
    tiles,
    split_kv=st.integers(1, 1024),
    pack_gqa=st.booleans(),
    tma=st.booleans(),
    pdl=st.booleans(),
    source=st.text(),
)


@settings(deadline=None)
@given(plans)
def test_json_round_trip(plan):
    text = json.dumps(plan.to_json())
    for again in (Plan.from_json(text), Plan.from_json(json.loads(text))):
        assert again == plan and again.source == plan.source


@pytest.mark.parametrize(
    "data, message",
    (
        ({"tile": {"block_m": 16, "block_n": 16}}, "plan: missing field family"),
        ({"family": "tiled"}, "plan: missing field tile"),
        ({"family": "tiled", "tile": {"block_m": 16}}, "tile: missing field block_n"),
        ({"family": "tiled", "tile": {"block_m": 16, "block_n": 16, "warps": 4}}, "tile: unknown field warps"),
        ({"family": "tiled", "tile": {"block_m": 16, "block_n": 16}, "splits": 4}, "plan: unknown field splits"),
        ({"family": "tiled", "tile": {"block_m": 16, "block_n": 24}}, "block_n: got 24"),
    ),
)
def test_bad_json_is_refused_by_field(data, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(json.dumps(data))


# -- devices


@pytest.mark.parametrize(
    "name, arch, shared_memory",
    (
        ("sm_75", "sm_75", 65536),
        ("sm_80", "sm_80", 166912),
        ("sm_86", "sm_86", 101376),
        ("sm_87", "sm_87", 166912),
        ("sm89", "sm_89", 101376),
        ("SM_90", "sm_90", 232448),
        ("h200", "sm_90", 232448),
        ("sm_100", "sm_100", 232448),
        ("sm_120", "sm_120", 101376),
        ("hip", "hip", 65536),
    ),
)
def test_presets(name, arch, shared_memory):
    device = DeviceSpec.preset(name)
    assert (device.arch, device.shared_memory) == (arch, shared_memory)
    assert DeviceSpec.preset(name, sm_count=7).sm_count == 7


def test_a_preset_knows_the_installed_triton():
    from importlib import metadata

    try:
        installed = metadata.version("triton")
    except metadata.PackageNotFoundError:
        installed = ""
    assert DeviceSpec.preset("h200").triton == DeviceSpec.preset("sm_130").triton == installed


def test_every_listed_preset_exists():
    for name in DeviceSpec.preset_names():
        assert DeviceSpec.preset(name).sm_count > 0


@pytest.mark.parametrize("name", ("", "gpu", "sm_", "sm_9", "h9000"))
def test_an_unknown_preset_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="^device: got .*h200.*sm_90"):
        DeviceSpec.preset(name)


@pytest.mark.parametrize(
    "fields, name",
    (
        ({"capability": "cuda"}, "capability"),
        ({"capability": (9,)}, "capability"),
        ({"capability": (9, -1)}, "capability"),
        ({"sm_count": 0}, "sm_count"),
        ({"shared_memory": -1}, "shared_memory"),
        ({"warp_size": 32.0}, "warp_size"),
        ({"triton": "main"}, "triton"),
    ),
)
def test_a_device_refuses(fields, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        DeviceSpec(**{"name": "x", "capability": (9, 0), "sm_count": 132, "shared_memory": 232448, **fields})


def test_a_future_gpu_is_planned_for_like_hopper_within_the_smallest_shared_memory():
    future = DeviceSpec.preset("sm_130")
    assert (future.capability, future.shared_memory) == ((13, 0), 101376)
    as_hopper = select(VERIFY, replace(H200, sm_count=future.sm_count), plan="heuristic")
    fits = select(VERIFY, future, plan="heuristic")
    assert fits == replace(as_hopper, tile=replace(as_hopper.tile, num_stages=2))
    assert select(VERIFY, future, plan="sglang") == select(VERIFY, H200, plan="sglang")
    assert illegal(VERIFY, replace(fits, split_kv=2, pdl=True), future) is None


# -- legality

LEGAL = Plan("tiled", Tile(64, 32, 4, 2))


@pytest.mark.parametrize(
    "plan, device, reason",
    (
        (replace(LEGAL, split_kv=2), "h200", "split_kv: 2; only the packed family"),
        (Plan("packed", Tile(16, 32), pack_gqa=True), "h200", "pack_gqa: "),
        (Plan("packed", Tile(16, 32), tma=True), "h200", "tma: only the tiled family"),
        (replace(LEGAL, tma=True), "a100", "tma: needs sm_90 or newer, not sm_80"),
        (replace(LEGAL, tma=True), "hip", "tma: needs sm_90 or newer, not hip"),
        (replace(LEGAL, pdl=True), "a100", "pdl: .* needs sm_90 or newer, not sm_80"),
        (replace(LEGAL, tile=Tile(64, 32, 32, 2)), "hip", "num_warps: 32 x 64 threads"),
        (replace(LEGAL, tile=Tile(256, 64, 4, 1)), "h200", "registers: 640 a thread .* there are 255"),
        (replace(LEGAL, tile=Tile(256, 256, 16, 1)), "h200", "registers: 256 a thread .* there are 128"),
        (replace(LEGAL, tile=Tile(64, 64, 4, 4)), "h200", r"shared memory: about \d+ bytes; .* sm_90 has 232448"),
        (replace(LEGAL, tile=Tile(64, 64, 4, 2)), "sm_86", "shared memory: .* sm_86 has 101376"),
    ),
)
def test_what_cannot_run_says_why(plan, device, reason):
    problem = replace(PREFILL, num_tokens=128, max_len_extend=128)
    device = DeviceSpec.preset(device)
    assert illegal(problem, LEGAL, device) is None or device.arch == "hip"
    with pytest.raises(ValueError, match="^plan: .*" + reason):
        select(problem, device, plan=plan)


def test_tma_needs_contiguous_aligned_keys():
    plan = replace(LEGAL, tma=True)
    assert illegal(CHUNK, plan, H200) is None
    assert "aligned to 8 bytes" in illegal(replace(CHUNK, alignment=8), plan, H200)
    assert "unified" in illegal(replace(CHUNK, unified=True), plan, H200)
    assert "multiple of 16 bytes" in illegal(replace(CHUNK, head_dim_v=100), plan, H200)
    assert "Triton 3.4" in illegal(CHUNK, plan, replace(H200, triton="3.2.0"))
    assert illegal(CHUNK, plan, replace(H200, triton="3.4.0+rocm")) is None


TREE = {"custom_mask": True, "mask_prefix": True, "sliding_window": 1024, "q_positions": True}


@pytest.mark.parametrize(
    "arch, fields, plan, allocated",  # bytes that Triton 3.7.1 allocated for the compiled kernel
    (
        ("sm_80", {}, Plan("tiled", Tile(64, 64, 4, 1)), 73728),
        ("sm_80", {}, Plan("tiled", Tile(64, 64, 4, 3)), 172032),
        ("sm_80", {"head_dim_qk": 128, "head_dim_v": 128}, Plan("tiled", Tile(128, 64, 8, 3)), 98304),
        ("sm_90", {}, Plan("packed", Tile(16, 32, 4, 1)), 25600),
        ("sm_90", {}, Plan("packed", Tile(16, 32, 4, 2)), 41984),
        ("sm_90", {}, Plan("packed", Tile(16, 32, 4, 3)), 74752),
        ("sm_90", {}, Plan("packed", Tile(32, 32, 8, 3)), 83968),
        ("sm_90", {}, Plan("tiled", Tile(64, 64, 4, 1)), 65536),
        ("sm_90", {}, Plan("tiled", Tile(64, 64, 4, 2)), 163840),
        ("sm_90", {}, Plan("tiled", Tile(64, 64, 4, 3)), 229376),
        ("sm_90", {}, Plan("tiled", Tile(64, 64, 4, 3), tma=True), 230424),
        ("sm_90", {"head_dim_qk": 192, "head_dim_v": 128}, Plan("tiled", Tile(64, 64, 4, 3)), 147456),
        ("sm_90", {"head_dim_qk": 576, "head_dim_v": 512}, Plan("tiled", Tile(64, 32, 8, 2)), 212992),
        ("sm_90", {"dtype": "float32", "kv_dtype": "", "out_dtype": ""}, Plan("packed", Tile(16, 16, 4, 2)), 50240),
        ("sm_90", {"kv_dtype": "float8_e4m3fn", "unified": True}, Plan("packed", Tile(16, 32, 4, 3)), 41984),
        ("sm_90", {"kv_dtype": "float8_e4m3fn", "unified": True}, Plan("tiled", Tile(64, 64, 4, 3)), 131072),
        ("sm_90", TREE, Plan("tiled", Tile(64, 64, 4, 2)), 164096),
        ("sm_100", {}, Plan("tiled", Tile(64, 64, 4, 3), tma=True), 230432),
        ("sm_100", TREE, Plan("tiled", Tile(64, 64, 4, 3)), 246816),
        ("sm_120", {"kv_dtype": "float8_e4m3fn"}, Plan("tiled", Tile(64, 32, 4, 2)), 86016),
        ("sm_120", {"kv_dtype": "float8_e4m3fn"}, Plan("tiled", Tile(64, 32, 4, 3)), 102400),
        ("sm_120", {**TREE, "head_dim_qk": 128, "head_dim_v": 128}, Plan("packed", Tile(16, 64, 4, 3)), 74240),
    ),
)
def test_the_estimate_of_shared_memory_is_what_the_compiler_takes_or_a_little_more(arch, fields, plan, allocated):
    estimate = shared_memory_bytes(replace(CHUNK, **fields), plan, DeviceSpec.preset(arch))
    assert allocated <= estimate <= allocated + 2048


def test_a_value_inside_its_key_takes_no_shared_memory():
    mla = replace(CHUNK, head_dim_qk=576, head_dim_v=512, unified=True)
    plan = Plan("packed", Tile(16, 32, 4, 2))
    saved = shared_memory_bytes(mla, plan, H200) - shared_memory_bytes(replace(mla, v_aliases_k_pool=True), plan, H200)
    assert saved == 32 * 512 * 2
