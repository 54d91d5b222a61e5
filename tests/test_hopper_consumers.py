"""Three and four consumers of hopper_tiled, which take the rows of one head and no key of a pool."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import make_case
from modes import GPU
from test_hopper_tiled import CHUNK, H100, gpu, hopper, plan_of

from extend_attn.plan import Plan, Tile, illegal
from extend_attn.plan.candidates import shrinking

NEW = replace(CHUNK, num_kv_indices=0, head_dim_qk=64, head_dim_v=64)
# around a consumer's 64 rows and programs of 192 and 256
LENGTHS = [(n, 0) for n in (1, 63, 64, 65, 128, 129, 191, 192, 193, 0, 255, 256, 257, 320, 513, 1000)]


def plan_with(consumers: int, **changes) -> Plan:
    plan = Plan("hopper_tiled", Tile(64 * consumers, 64, 4 * consumers, 2))
    return plan.merged(changes) if changes else plan


@gpu
@hopper
@pytest.mark.parametrize("consumers, dim", [(3, 64), (3, 96), (3, 128), (4, 64), (4, 40)])
@pytest.mark.parametrize(
    "spec",
    [
        dict(),
        dict(lead=5, max_len_extend=2000, heads=(3, 3)),
        dict(causal=False),
        dict(window=1),
        dict(window=100, sinks=torch.float32),
        dict(window=200, tree_positions=True),
        dict(logit_cap=20.0, temperature_len=100),
        dict(dtype=torch.float16, sm_scale=1.0),
        dict(out_dtype=torch.float32, sm_scale=-0.1),
        dict(sm_scale=0.0, window=100),
    ],
    ids=str,
)
def test_features(spec, consumers, dim):
    base = dict(dtype=torch.bfloat16, device="cuda", lengths=LENGTHS, heads=(4, 2), beyond=0)
    GPU["hopper_tiled"].check(make_case(**{**base, "dim": dim, **spec}), plan=plan_with(consumers).to_json())


@gpu
@hopper
@pytest.mark.parametrize("consumers, splits", [(3, 3), (4, 2)])
def test_splits(consumers, splits):
    case = make_case(dtype=torch.bfloat16, device="cuda", lengths=LENGTHS, heads=(4, 2), beyond=0, dim=64)
    GPU["hopper_tiled"].check(case, plan=plan_with(consumers, split_kv=splits).to_json())


@gpu
@hopper
@pytest.mark.parametrize("consumers", [3, 4])
@pytest.mark.parametrize("stages", [2, 3])
def test_repeats_are_bit_identical(stages, consumers):
    case = make_case(dtype=torch.bfloat16, device="cuda", lengths=LENGTHS, heads=(4, 2), beyond=0, dim=64)
    plan = plan_with(consumers, tile={"num_stages": stages}).to_json()
    first = GPU["hopper_tiled"].call(case, plan=plan)[0].nan_to_num()
    assert all(torch.equal(first, GPU["hopper_tiled"].call(case, plan=plan)[0].nan_to_num()) for _ in range(150))


# -- plans; need no GPU


@pytest.mark.parametrize(
    "consumers, dim", [(3, 64), (3, 96), (3, 128), (4, 64)]
)
def test_what_fits(consumers, dim):
    assert illegal(replace(NEW, head_dim_qk=dim, head_dim_v=dim), plan_with(consumers), H100) is None


@pytest.mark.parametrize(
    "problem, changes, word",
    [
        (replace(NEW, num_kv_indices=4096), dict(), "gathers"),
        (replace(NEW, custom_mask=True), dict(), "mask"),
        (replace(NEW, head_dim_qk=128, head_dim_v=128), dict(), "registers"),
        (NEW, dict(pack_gqa=True), "pack_gqa"),
        (NEW, dict(tile=dict(block_n=128)), "registers"),
        (NEW, dict(tile=dict(num_stages=1)), "num_stages"),
        (NEW, dict(tile=dict(block_m=128)), "block_m"),
        (NEW, dict(tile=dict(num_warps=12)), "block_m"),
        (NEW, dict(tile=dict(num_warps=32)), "num_warps"),
        (NEW, dict(family="tiled", tile=dict(num_warps=12)), "powers of two"),
        (NEW, dict(family="tiled", tile=dict(block_m=192, num_warps=8)), "powers of two"),
    ],
    ids=str,
)
def test_what_four_do_not_serve(problem, changes, word):
    reason = illegal(problem, plan_with(4, **changes), H100)
    assert reason is not None and word in reason


def test_they_step_down_to_two():
    sizes = [plan.tile for plan in shrinking(NEW, plan_with(3, tile=dict(num_stages=3)), H100)]
    assert sizes[-1] == Tile(128, 64, 8, 1)
    assert plan_of(NEW).tile.num_warps in (8, 16)
