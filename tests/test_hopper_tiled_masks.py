"""The tiled Hopper family where a mask, positions or latent values decide what its blocks see and read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import make_case
from modes import GPU
from test_hopper_tiled import CHUNK, FAMILY, FEW, H100, UGLY, check, gpu, hopper, plan_of, repeat

from extend_attn.plan import illegal


@gpu
@hopper
@pytest.mark.parametrize("dim, gqa", [(128, False), (64, True), (256, True), (512, False)])
@pytest.mark.parametrize(
    "spec",
    [
        dict(mask="tree"),
        dict(mask="random", mask_prefix=True),
        dict(mask="nothing", sinks=torch.float32),
        dict(mask="future", window=100, cut=[5, 0, 77, 3, 0, 1, 2, 0, 9, 1, 0], mask_prefix=True),
        dict(mask="tree", tree_positions=True, window=40, temperature_len=100),
        dict(tree_positions=True, window=64),
        dict(mask="random", unified=True),
        dict(mask="random", tree_positions=True, unified=True, window=100),
    ],
    ids=str,
)
def test_masks_and_positions(spec, dim, gqa):
    """Rows that see nothing, in one tile or at all; windows over depths."""
    case = make_case(dtype=torch.bfloat16, device="cuda", lengths=UGLY, heads=(4, 2), dim=dim, **spec)
    GPU["hopper_tiled"].check(case, plan={"family": FAMILY, "pack_gqa": gqa})


@gpu
@hopper
@pytest.mark.parametrize("dim, gqa", [(64, True), (512, False)])
@pytest.mark.parametrize(
    "spec",
    [
        dict(mask="tree"),
        dict(mask="random", mask_prefix=True),
        dict(mask="nothing", sinks=torch.float32),
        dict(mask="tree", tree_positions=True, temperature_len=100),
        dict(mask="random", unified=True),
    ],
    ids=str,
)
def test_splits_of_masked_keys(spec, dim, gqa):
    """Rows that see nothing of a part, or of any."""
    case = make_case(dtype=torch.bfloat16, device="cuda", lengths=FEW, heads=(4, 2), dim=dim, **spec)
    GPU["hopper_tiled"].check(case, plan={"family": FAMILY, "pack_gqa": gqa, "split_kv": 3})


@gpu
@hopper
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("no_prefix", [False, True])
def test_masks_beside_other_features(no_prefix, kv_dtype):
    lengths = [(e, 0) for e, _ in UGLY] if no_prefix else UGLY
    for mask_prefix in (False, True):
        spec = dict(mask="random", mask_prefix=mask_prefix, logit_cap=20.0, sm_scale=-0.1, k_scale=0.5, v_scale=2.0)
        check(True, dim=96, lengths=lengths, kv_dtype=kv_dtype, **spec)


@gpu
@hopper
def test_windows_are_not_split():
    case = make_case(dtype=torch.bfloat16, device="cuda", lengths=FEW, heads=(4, 2), dim=128, window=300)
    GPU["hopper_tiled"].check(case, plan={"family": FAMILY, "split_kv": 3})


@gpu
@hopper
@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_a_mask_hides_may_be_anything(bad, unified):
    """In whole tiles and in parts of one, over more rows than one program has."""
    case = make_case(
        dtype=torch.bfloat16, device="cuda", lengths=[(300, 200), (65, 3)], heads=(4, 2), dim=128, mask="random",
        mask_prefix=True, unified=unified,
    )  # fmt: skip
    mask = case.kwargs["custom_mask"][: 300 * 500].view(300, 500)
    mask[:, 3:20:2] = False
    mask[:, 64:128] = False
    mask[:, 200 + 7] = False
    mask[:, 200 + 270 :] = False
    hidden = ~mask.any(dim=0)
    slots = case.kwargs["kv_indices"]
    if unified:
        own = slots[:500].long()[hidden]
    else:
        own = slots[:200].long()[hidden[:200]]
        for name in ("k_extend", "v_extend"):
            case.kwargs[name][:300][hidden[200:]] = bad
    for name in ("k_buffer", "v_buffer"):
        case.kwargs[name][own] = bad
    for gqa in (False, True):
        GPU["hopper_tiled"].check(case, plan={"family": FAMILY, "pack_gqa": gqa})


@gpu
@hopper
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "spec",
    [
        dict(),
        dict(heads=(16, 1), dtype=torch.float16, out_dtype=torch.float32),
        dict(dim=520, dim_v=400, sinks=torch.float32, logit_cap=20.0),
        dict(unified=True),
        dict(window=100, k_scale=0.5, v_scale=2.0, temperature_len=100),
        dict(mask="tree", window=100, tree_positions=True),
        dict(mask="random", mask_prefix=True, causal=False),
        dict(lengths=[(e, 0) for e, _ in UGLY]),
        dict(lengths=[(e, 0) for e, _ in UGLY], mask="random"),
        dict(apart=True),
        dict(apart=True, mask="random", mask_prefix=True, v_scale=2.0),
        dict(apart=True, lengths=[(e, 0) for e, _ in UGLY]),
        dict(mask="nothing", unified=True, sm_scale=-0.1),
    ],
    ids=str,
)
def test_latent_values(spec, splits):
    spec = {"dim": 576, "dim_v": 512, "heads": (4, 1), "lengths": UGLY, "dtype": torch.bfloat16, **spec}
    if splits > 1:
        spec["lengths"] = [(e, p if any(p for _, p in spec["lengths"]) else 0) for e, p in FEW]
        spec["heads"] = (4, 1)  # more heads are more blocks than programs
    apart = spec.pop("apart", False)
    case = make_case(device="cuda", alias=True, **spec)
    if apart:
        case.kwargs["v_extend"] = case.kwargs["v_extend"].flip(2).contiguous()
    GPU["hopper_tiled"].check(case, plan={"family": FAMILY, "split_kv": splits})


@gpu
@hopper
@pytest.mark.parametrize(
    "spec",
    [
        dict(dim=576, dim_v=512, alias=True, heads=(4, 1)),
        dict(dim=128, mask="random", mask_prefix=True),
        dict(dim=256, mask="tree", tree_positions=True, window=100),
    ],
    ids=str,
)
def test_repeats_of_latent_and_masked_calls(spec):
    repeat(GPU["hopper_tiled"], make_case(**{"dtype": torch.bfloat16, "device": "cuda", "lengths": UGLY, **spec}))


# -- plans; need no GPU


LATENT = replace(CHUNK, head_dim_qk=576, head_dim_v=512, num_kv_heads=1, v_aliases_k_pool=True, v_aliases_k_new=True)


def test_latent_values_need_an_alias_and_have_a_plan_of_their_own():
    plan = plan_of(LATENT)
    assert (plan.tile.block_m, plan.pack_gqa) == (64, False)
    assert illegal(LATENT, plan, H100) is None
    assert "share one head" in str(illegal(LATENT, replace(plan, pack_gqa=True), H100))
    assert illegal(replace(LATENT, v_aliases_k_new=False), plan, H100) is None
    assert "head dims" in str(illegal(replace(LATENT, v_aliases_k_pool=False), plan_of(CHUNK), H100))
