"""Four consumers of hopper_tiled, which take the rows of one head and no key of a pool."""

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
# around a consumer's 64 rows and a program's 256
LENGTHS = [(n, 0) for n in (1, 63, 64, 65, 128, 129, 191, 192, 193, 0, 255, 256, 257, 320, 513, 1000)]


def four(**changes) -> Plan:
    plan = Plan("hopper_tiled", Tile(256, 64, 16, 2))
    return plan.merged(changes) if changes else plan


def check(plan: Plan, **spec) -> None:
    base = dict(dtype=torch.bfloat16, device="cuda", lengths=LENGTHS, heads=(4, 2), dim=64, beyond=0)
    GPU["hopper_tiled"].check(make_case(**{**base, **spec}), plan=plan.to_json())


@gpu
@hopper
@pytest.mark.parametrize(
    "spec",
    [
        dict(),
        dict(dim=40, dim_v=24),
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
def test_features(spec):
    check(four(), **spec)


@gpu
@hopper
@pytest.mark.parametrize("changes", [dict(pdl=True), dict(tile={"num_stages": 3})], ids=str)
def test_dependent_launch_and_rings(changes):
    check(four(**changes))


@gpu
@hopper
def test_repeats_are_bit_identical():
    case = make_case(dtype=torch.bfloat16, device="cuda", lengths=LENGTHS, heads=(4, 2), beyond=0, dim=64)
    plan = four().to_json()
    first = GPU["hopper_tiled"].call(case, plan=plan)[0].nan_to_num()
    assert all(torch.equal(first, GPU["hopper_tiled"].call(case, plan=plan)[0].nan_to_num()) for _ in range(150))


# -- plans; need no GPU


@pytest.mark.parametrize(
    "changes, warps",
    [
        (dict(), 16),
        (dict(max_len_extend=300), 8),
        (dict(batch_size=1, num_tokens=1024), 8),  # too few blocks to fill the GPU
        (dict(sliding_window=1024), 8),
        (dict(num_kv_indices=4096), 8),
        (dict(custom_mask=True), 8),
        (dict(head_dim_qk=128, head_dim_v=128), 8),
    ],
    ids=str,
)
def test_where_they_are_the_default(changes, warps):
    problem = replace(NEW, **changes)
    plan = plan_of(problem)
    assert plan.tile.num_warps == warps
    assert illegal(problem, plan, H100) is None


@pytest.mark.parametrize(
    "problem, changes, word",
    [
        (replace(NEW, num_kv_indices=4096), dict(), "gathers"),
        (replace(NEW, custom_mask=True), dict(), "mask"),
        (replace(NEW, head_dim_qk=128, head_dim_v=128), dict(), "registers"),
        (NEW, dict(pack_gqa=True), "pack_gqa"),
        (NEW, dict(split_kv=2), "split_kv"),
        (NEW, dict(tile=dict(block_n=128)), "registers"),
        (NEW, dict(tile=dict(num_stages=1)), "num_stages"),
        (NEW, dict(tile=dict(block_m=128)), "block_m"),
        (NEW, dict(tile=dict(num_warps=8)), "block_m"),
        (NEW, dict(tile=dict(num_warps=32)), "num_warps"),
    ],
    ids=str,
)
def test_what_they_do_not_serve(problem, changes, word):
    reason = illegal(problem, four(**changes), H100)
    assert reason is not None and word in reason


def test_they_step_down_to_two():
    tiles = [plan.tile for plan in shrinking(NEW, four(tile=dict(num_stages=3)), H100)]
    assert tiles == [Tile(256, 64, 16, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 1)]
