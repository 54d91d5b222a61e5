"""The tiled Hopper family at the head dims, groups and lengths that its own blocks break at; on a GPU of that kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import make_case
from modes import GPU

from extend_attn import calls
from extend_attn.plan import DeviceSpec, Plan, Tile, illegal, select, shared_memory_bytes
from extend_attn.plan.heuristics import heuristic
from extend_attn.plan.legality_hopper_tiled import tiled_queries, tiled_sections
from extend_attn.plan.select import forget
from extend_attn.problem import Problem

FAMILY = "hopper_tiled"
H100 = replace(DeviceSpec.preset("h100"), triton="3.6.0")
CHUNK = Problem("bfloat16", 256, 256, 8, 4, 4, 4096, 1024, 4 * 4096)

gpu = pytest.mark.gpu
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)

# (new tokens, prefix): around 64 and 128, a neighbour's poisoned rows behind every end
UGLY = [
    (1, 129), (63, 64), (64, 63), (65, 0), (127, 1), (128, 128), (129, 500), (300, 65), (0, 70), (513, 1000), (0, 0),
]  # fmt: skip
# of so few blocks that their keys are split
FEW = [(1, 129), (65, 700), (0, 70), (129, 0), (300, 1500)]
DIMS = [
    *((dim, dim) for dim in (64, 80, 96, 128, 256, 384, 512)),
    (192, 128), (160, 64), (256, 128), (40, 24),
]  # fmt: skip


def check(gqa: bool, **spec) -> None:
    mode = GPU["hopper_tiled_gqa" if gqa else "hopper_tiled"]
    mode.check(make_case(**{"dtype": torch.bfloat16, "device": "cuda", "lengths": UGLY, "heads": (4, 2), **spec}))


@gpu
@hopper
@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("dim, dim_v", DIMS)
def test_head_dims(dim, dim_v, gqa):
    check(gqa, dim=dim, dim_v=dim_v)


@gpu
@hopper
@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("window", [1, 64, 100])
def test_windows(dim, window, gqa):
    check(gqa, dim=dim, window=window)


@gpu
@hopper
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (5, 1), (8, 2), (16, 2), (12, 2)])
@pytest.mark.parametrize("gqa", [False, True])
def test_groups(heads, gqa):
    if gqa and heads[0] // heads[1] % 2:
        pytest.skip("an odd group does not pair")
    check(gqa, dim=128, heads=heads)


@gpu
@hopper
@pytest.mark.parametrize("no_prefix, gqa", [(True, False), (False, True)])
@pytest.mark.parametrize(
    "spec",
    [
        dict(dtype=torch.float16),
        dict(out_dtype=torch.float32),
        dict(causal=False),
        dict(sinks=torch.float32),
        dict(logit_cap=20.0),
        dict(temperature_len=100),
        dict(temperature_len=100, window=200, cut=[5, 0, 77, 3, 0, 1, 2, 0, 9, 1, 0]),
        dict(sm_scale=-0.1),
        dict(sm_scale=0.0),
        dict(sm_scale=1.0),  # maxima grow by less and by more than what lets them stand
        dict(sm_scale=1.0, dtype=torch.float16),
        dict(k_scale=0.5, v_scale=2.0),
        dict(layout="plain", pool_layout="strided", index_dtype=torch.int32),
        dict(lead=5, max_len_extend=2000),
    ],
    ids=str,
)
def test_features(spec, no_prefix, gqa):
    lengths = [(e, 0) for e, _ in UGLY] if no_prefix else UGLY
    check(gqa, dim=128, lengths=lengths, **spec)


@gpu
@hopper
@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("batch, window", [(1, -1), (127, -1), (300, -1), (300, 50)])
def test_many_sequences(batch, window, gqa):
    """More sequences than the search for work items looks at in one step; empty ones among them."""
    pick = torch.Generator().manual_seed(batch)
    lengths = [tuple(pair) for pair in torch.randint(-20, 300, (batch, 2), generator=pick).clamp(min=0).tolist()]
    check(gqa, dim=64, lengths=lengths, window=window)


@gpu
@hopper
def test_fp32_output_of_sliced_values_is_not_rounded():
    check(True, dim=512, out_dtype=torch.float32, heads=(4, 2))


@gpu
@hopper
@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("dim", [128, 256, 512])
def test_repeats_are_bit_identical(dim, gqa):
    mode = GPU["hopper_tiled_gqa" if gqa else "hopper_tiled"]
    case = make_case(dtype=torch.bfloat16, device="cuda", lengths=UGLY, heads=(4, 2), dim=dim)
    repeat(mode, case)


def repeat(mode, case) -> None:
    first = mode.call(case)[0].nan_to_num()
    assert all(torch.equal(first, mode.call(case)[0].nan_to_num()) for _ in range(150))


@gpu
@hopper
@pytest.mark.parametrize("tile", [dict(block_n=64), dict(num_stages=1), dict(block_n=64, num_stages=4)], ids=str)
def test_tiles(tile):
    case = make_case(dtype=torch.bfloat16, device="cuda", lengths=UGLY, heads=(4, 2), dim=128)
    GPU["hopper_tiled_gqa"].check(case, plan={"family": "hopper_tiled", "pack_gqa": True, "tile": tile})


@gpu
@hopper
@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize(
    "spec",
    [
        dict(),
        dict(window=100),
        dict(causal=False),
        dict(unified=True),
        dict(out_dtype=torch.float32, sinks=torch.float32),
        dict(lengths=[(e, 0) for e, _ in UGLY]),
    ],
    ids=str,
)
def test_rings_at_head_dim_256(spec, num_stages, gqa):
    """One ring for keys and values, and one each; two query tiles a consumer, and one."""
    base = dict(dtype=torch.bfloat16, device="cuda", lengths=UGLY, heads=(4, 2), dim=256)
    case = make_case(**{**base, **spec})
    plan = {"family": "hopper_tiled", "pack_gqa": gqa, "split_kv": 1, "tile": {"num_stages": num_stages}}
    GPU["hopper_tiled"].check(case, plan=plan)


@gpu
@hopper
@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("heads, batch, window", [((8, 4), 5, -1), ((8, 2), 40, -1), ((16, 8), 150, 70)])
def test_sections(heads, batch, window, gqa, monkeypatch):
    """Keys and values that the L2 does not hold: as many sections as there are KV heads."""
    monkeypatch.setattr("extend_attn.plan.legality_hopper_tiled.SECTION_BYTES", 0)
    monkeypatch.setattr("extend_attn.plan.legality_hopper_tiled.SECTION_ITEMS_MIN", 1)
    pick = torch.Generator().manual_seed(batch)
    lengths = [tuple(pair) for pair in torch.randint(-20, 400, (batch, 2), generator=pick).clamp(min=0).tolist()]
    check(gqa, dim=64, lengths=lengths, window=window, heads=heads)


@gpu
@hopper
@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("dim, splits", [(64, 2), (96, 3), (256, 5), (512, 4)])
@pytest.mark.parametrize(
    "spec",
    [
        dict(),
        dict(sinks=torch.float32, k_scale=0.5, v_scale=2.0),
        dict(causal=False),
        dict(unified=True),
        dict(lengths=[(500, 0), (3, 0), (0, 0)]),
        dict(lengths=[(1, 3000)], max_len_extend=1000),
    ],
    ids=str,
)
def test_splits(spec, splits, dim, gqa):
    spec = {"dtype": torch.bfloat16, "device": "cuda", "lengths": FEW, "heads": (4, 2), "dim": dim, **spec}
    case = make_case(**spec)
    GPU["hopper_tiled"].check(case, plan={"family": FAMILY, "pack_gqa": gqa, "split_kv": splits})


@gpu
@hopper
@pytest.mark.parametrize("patience", [0, 1, 1024])
@pytest.mark.parametrize("splits", [2, 5])
def test_repeats_of_splits_are_bit_identical(splits, patience, monkeypatch):
    """Whoever merges: the programs together, or the last one alone."""
    monkeypatch.setattr("extend_attn.kernels.hopper.launch_tiled.PATIENCE", patience)
    calls.forget()
    case = make_case(dtype=torch.bfloat16, device="cuda", dim=128, lengths=FEW, heads=(4, 2))
    plan = {"family": FAMILY, "split_kv": splits}
    wanted = GPU[FAMILY].check(case, plan=plan).nan_to_num()
    assert all(torch.equal(wanted, GPU[FAMILY].call(case, plan=plan)[0].nan_to_num()) for _ in range(100))
    calls.forget()


@gpu
@hopper
@pytest.mark.parametrize("dim, gqa", [(64, False), (256, True)])
@pytest.mark.parametrize(
    "spec", [dict(), dict(window=100), dict(k_scale=0.5, v_scale=2.0), dict(causal=False)], ids=str
)
def test_unified(spec, dim, gqa):
    check(gqa, dim=dim, unified=True, **spec)


@gpu
@hopper
@pytest.mark.parametrize("unified, gqa", [(False, True), (True, False)])
@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dim, dtype", [(64, torch.float16), (96, torch.bfloat16), (128, torch.float16),
                                        (256, torch.bfloat16), (256, torch.float16)])  # fmt: skip
def test_fp8_pools(dim, dtype, kv_dtype, unified, gqa):
    check(gqa, dim=dim, dtype=dtype, kv_dtype=kv_dtype, unified=unified, k_scale=0.5, v_scale=0.25)


# new tokens and prefixes that end inside pages, inside tiles and at their ends
PAGED = [(64, 1024), (70, 1030), (129, 700), (1, 64), (200, 2049), (128, 15), (33, 0), (65, 16), (300, 513)]


@gpu
@hopper
@pytest.mark.parametrize("page", [16, 64, 128])
@pytest.mark.parametrize("dim, dim_v", [(64, 64), (96, 96), (192, 128), (256, 256), (512, 512)])
def test_pages(dim, dim_v, page):
    """Runs of slots go through TMA, tiles with a key out of order through copies."""
    check(True, dim=dim, dim_v=dim_v, page=page, lengths=PAGED)


@gpu
@hopper
@pytest.mark.parametrize(
    "spec",
    [
        dict(window=100), dict(causal=False), dict(unified=True), dict(unified=True, window=200),
        dict(pool_layout="strided"), dict(kv_dtype=torch.float8_e4m3fn), dict(index_dtype=torch.int32, lead=5),
        dict(heads=(3, 1)), dict(lead=64),
    ],
    ids=str,
)  # fmt: skip
def test_pages_with(spec):
    check(False, **{"dim": 128, "page": 16, "lengths": PAGED, **spec})


@gpu
@hopper
def test_pages_in_splits():
    case = make_case(dtype=torch.bfloat16, device="cuda", lengths=PAGED[:5], heads=(4, 2), dim=256, page=32)
    GPU["hopper_tiled"].check(case, plan={"family": "hopper_tiled", "split_kv": 3})


# -- plans; need no GPU


def plan_of(problem: Problem, **changes) -> Plan:
    plan = heuristic(problem, H100, FAMILY)
    return plan.merged(changes) if changes else plan


@pytest.mark.parametrize("dim, dim_v", DIMS)
def test_default_plans_fit(dim, dim_v):
    problem = replace(CHUNK, head_dim_qk=dim, head_dim_v=dim_v)
    assert illegal(problem, plan_of(problem), H100) is None
    assert shared_memory_bytes(problem, plan_of(problem), H100) <= H100.shared_memory


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(head_dim_qk=576, head_dim_v=512), "head dims"),
        (dict(kv_dtype="float8_e4m3fn", head_dim_qk=512, head_dim_v=512, sliding_window=1024), "kv_dtype"),
        (dict(dtype="float32", kv_dtype="float32", out_dtype="float32"), "fp32"),
        (dict(alignment=8), "aligned"),
    ],
    ids=str,
)
def test_what_it_does_not_serve_falls_to_the_plain_family(changes, word):
    problem = replace(CHUNK, **changes)
    reason = illegal(problem, plan_of(CHUNK), H100)
    assert reason is not None and word in reason
    assert select(problem, H100).family == "tiled"


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(tile=dict(block_m=64)), "block_m"),
        (dict(tile=dict(block_n=32)), "block_n"),
        (dict(tile=dict(block_n=128)), "registers"),
        (dict(tile=dict(num_warps=4)), "num_warps"),
        (dict(tile=dict(num_stages=4)), "shared memory"),
        (dict(programs=132), "programs"),
        (dict(tma=True), "tma"),
    ],
    ids=str,
)
def test_illegal_plans_say_why(changes, word):
    reason = illegal(CHUNK, plan_of(CHUNK, **changes), H100)
    assert reason is not None and word in reason


def test_rings_and_queries_of_head_dim_256():
    """Short blocks leave room for the next item's query, whole prompts have the deeper rings, fp8 codes take room."""
    for changes, stages, queries in [
        (dict(), 1, 2),
        (dict(max_len_extend=8192), 2, 1),
        (dict(max_len_extend=8192, sliding_window=1024), 1, 2),
        (dict(kv_dtype="float8_e4m3fn", sliding_window=1024), 1, 1),  # codes lie beside the ring
        (dict(kv_dtype="float8_e4m3fn"), 1, 2),  # gathered ahead, they are none
        (dict(head_dim_v=128), 2, 2),
    ]:
        problem = replace(CHUNK, **changes)
        plan = plan_of(problem)
        assert (plan.tile.num_stages, tiled_queries(problem, plan)) == (stages, queries), changes
    assert tiled_queries(replace(CHUNK, head_dim_qk=128, head_dim_v=128), plan_of(CHUNK)) == 2


def test_sections_keep_every_multiprocessor_busy():
    assert tiled_sections(CHUNK, items=1024) == 4  # 168 MB, and no more KV heads
    assert tiled_sections(CHUNK, items=256) == 1  # 128 items a section leave some idle
    assert tiled_sections(replace(CHUNK, num_tokens=8192, num_kv_indices=0), items=512) == 2  # 34 MB


def test_odd_groups_do_not_pair_and_masks_take_narrow_tiles():
    odd = replace(CHUNK, num_q_heads=12)
    assert not plan_of(odd).pack_gqa
    assert "odd" in str(illegal(odd, plan_of(odd, pack_gqa=True), H100))
    masked = replace(CHUNK, custom_mask=True, head_dim_qk=128, head_dim_v=128)
    assert plan_of(masked).tile.block_n == 64
    assert "mask" in str(illegal(masked, plan_of(masked, tile=dict(block_n=128)), H100))


def test_few_blocks_split_their_keys():
    one = Problem("bfloat16", 256, 256, 8, 4, 1, 512, 512, 8192)
    assert plan_of(one).split_kv > 1
    assert plan_of(replace(one, num_tokens=1000, max_len_extend=1000, num_kv_indices=0)).split_kv > 1
    assert plan_of(replace(one, batch_size=2, num_tokens=1024, num_kv_indices=2 * 8192)).split_kv == 2
    even = replace(one, batch_size=16, num_tokens=2048, max_len_extend=128, num_kv_indices=16 * 2048)
    assert plan_of(even).split_kv == 1  # a wave of equal blocks
    assert plan_of(CHUNK).split_kv == 1
    assert plan_of(replace(one, sliding_window=100)).split_kv == 1


@pytest.mark.parametrize(
    "device", [DeviceSpec.preset("a100"), DeviceSpec.preset("b200"), replace(H100, triton="3.5.1")], ids=str
)
def test_elsewhere_the_plain_family_runs(device):
    assert illegal(CHUNK, Plan(FAMILY, Tile(128, 64, 8, 2)), device) is not None
    assert select(CHUNK, device).family == "tiled"


def test_it_is_the_default_where_it_is_proven(monkeypatch):
    monkeypatch.setattr("extend_attn.plan.heuristics_hopper.PROVEN", (FAMILY,))
    monkeypatch.setattr("extend_attn.plan.tables.PACKAGED", Path("no tables"))
    forget()
    assert select(CHUNK, H100).family == FAMILY
    assert select(replace(CHUNK, max_len_extend=64), H100).pack_gqa
    assert select(replace(CHUNK, custom_mask=True), H100).family == FAMILY
    forget()
