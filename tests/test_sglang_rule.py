"""The published tile rule, row by row: every branch, on both sides of each border."""

from __future__ import annotations

import pytest

from extend_attn.plan import DeviceSpec, select, sglang_rule
from extend_attn.problem import Problem

HEAD_DIMS = (64, 128, 129, 256, 257, 512)
# (BLOCK_M, BLOCK_N) for each of HEAD_DIMS, with the rule's ordinary warps (4 to head dim 64, else 8) and one stage.
BLOCKS = {
    (12, 0): ((64, 128), (64, 128), (64, 64), (64, 64), (32, 32), (32, 32)),
    (12, 1): ((64, 128), (64, 128), (64, 64), (64, 64), (32, 32), (32, 32)),
    (10, 0): ((64, 64), (64, 64), (64, 64), (64, 64), (16, 64), (16, 64)),
    (10, 3): ((64, 64), (64, 64), (64, 64), (64, 64), (16, 64), (16, 64)),
    (8, 0): ((128, 128), (128, 128), (64, 64), (64, 64), (32, 64), (32, 64)),
    (8, 7): ((128, 128), (128, 128), (64, 64), (64, 64), (32, 64), (32, 64)),
    (8, 6): ((64, 128), (64, 128), (64, 64), (64, 64), (32, 32), (32, 32)),
    (8, 9): ((64, 128), (64, 128), (64, 64), (64, 64), (32, 32), (32, 32)),
    (7, 5): ((64, 64), (64, 64), (32, 32), (32, 32), (32, 32), (32, 32)),
    (7, 0): ((64, 64), (64, 64), (32, 32), (32, 32), (32, 32), (32, 32)),
    (6, 1): ((64, 64), (64, 64), (32, 32), (32, 32), (32, 32), (32, 32)),
}
HOPPER_AND_UNKNOWN = ((9, 0), (9, 9), (11, 0), (13, 0), (20, 5))


def tile(head_dim, capability, **known):
    """(BLOCK_M, BLOCK_N, num_warps, num_stages)"""
    return sglang_rule(head_dim, head_dim, capability=capability, **known)[3:]


@pytest.mark.parametrize("legacy", (False, True))
@pytest.mark.parametrize("capability", sorted(BLOCKS))
def test_rows_that_look_at_head_dim_alone(capability, legacy):
    for head_dim, blocks in zip(HEAD_DIMS, BLOCKS[capability]):
        expected = (*blocks, 4 if head_dim <= 64 else 8, 1)
        for known in ({}, {"batch_size": 32, "max_len_extend": 4}):
            assert tile(head_dim, capability, legacy=legacy, **known) == expected, head_dim


@pytest.mark.parametrize("legacy", (False, True))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_hip(head_dim, legacy):
    assert tile(head_dim, "hip", legacy=legacy, batch_size=32, max_len_extend=4) == (64, 64, 4, 1)


@pytest.mark.parametrize("capability", HOPPER_AND_UNKNOWN)
def test_hopper_and_whatever_comes_after_it(capability):
    for known in ({}, {"batch_size": 32, "max_len_extend": 4}):
        assert tile(64, capability, **known) == (128, 64, 4, 1)
        assert tile(128, capability, **known) == (128, 64, 8, 1)
        assert tile(257, capability, **known) == (32, 64, 8, 1)
        assert tile(512, capability, **known) == (32, 64, 8, 1)


@pytest.mark.parametrize("head_dim", (129, 192, 256))
@pytest.mark.parametrize("capability", HOPPER_AND_UNKNOWN)
def test_the_tuned_row(capability, head_dim):
    tuned, verify = (32, 64, 4, 2), (16, 64, 4, 2)
    for batch_size, max_len_extend, expected in (
        (8, 1, verify),
        (8, 16, verify),
        (256, 4, verify),
        (7, 4, tuned),
        (8, 17, tuned),
        (8, 0, tuned),  # the length is not known
        (1, 8192, tuned),
    ):
        assert tile(head_dim, capability, batch_size=batch_size, max_len_extend=max_len_extend) == expected


def test_an_unknown_batch_keeps_the_tuned_default():
    assert tile(256, (9, 0)) == (32, 64, 4, 2)
    assert tile(256, (9, 0), batch_size=0, max_len_extend=4) == (32, 64, 4, 2)
    assert "unknown" in sglang_rule.__doc__


@pytest.mark.parametrize("capability", HOPPER_AND_UNKNOWN)
def test_legacy_is_the_rule_before_tuning(capability):
    for head_dim, expected in (
        (64, (128, 64, 4, 1)),
        (128, (128, 64, 8, 1)),
        (192, (128, 64, 8, 1)),
        (256, (128, 64, 8, 1)),
        (257, (32, 64, 8, 1)),
    ):
        for known in ({}, {"batch_size": 32, "max_len_extend": 4}):
            assert tile(head_dim, capability, legacy=True, **known) == expected


@pytest.mark.parametrize(
    "head_dim_qk, head_dim_v, expected",
    (
        (576, 512, (512, 64, 512)),
        (288, 256, (256, 32, 256)),
        (192, 128, (128, 64, 128)),
        (256, 256, (256, 0, 256)),
        (96, 96, (128, 0, 128)),
        (80, 64, (128, 0, 64)),
        (16, 16, (16, 0, 16)),
        (320, 288, (512, 0, 512)),
    ),
)
@pytest.mark.parametrize("capability", ("hip", (8, 0), (9, 0), (12, 0)))
def test_head_dim_split(capability, head_dim_qk, head_dim_v, expected):
    assert sglang_rule(head_dim_qk, head_dim_v, capability=capability)[:3] == expected


@pytest.mark.parametrize("capability", ("cuda", "sm_90", (9,), (9, 0, 0)))
def test_a_capability_is_a_pair_or_hip(capability):
    with pytest.raises(ValueError, match="capability"):
        sglang_rule(128, 128, capability=capability)


@pytest.mark.parametrize(
    "batch_size, max_len_extend, selector, blocks",
    (
        (8, 4, "sglang", (16, 64, 4, 2)),
        (5, 4, "sglang", (32, 64, 4, 2)),  # the same power-of-two bucket as 8: the rule must see the true batch
        (1, 8192, "sglang", (32, 64, 4, 2)),
        (8, 4, "sglang-legacy", (128, 64, 8, 1)),
        (5, 4, "sglang-legacy", (128, 64, 8, 1)),
    ),
)
def test_as_a_selector_it_runs_the_tiled_family_one_head_a_tile(batch_size, max_len_extend, selector, blocks):
    problem = Problem("bfloat16", 256, 256, 8, 4, batch_size, batch_size * max_len_extend, max_len_extend, 32000)
    plan = select(problem, DeviceSpec.preset("h200"), plan=selector)
    t = plan.tile
    assert (t.block_m, t.block_n, t.num_warps, t.num_stages) == blocks
    assert (plan.family, plan.pack_gqa, plan.split_kv, plan.source) == ("tiled", False, 1, selector)
