"""fp8 pools: dequantised with their scales, and nothing else is ever rounded to fp8."""

from __future__ import annotations

import math

import pytest
import torch
from cases import FP8, put
from modes import modes

NAN_CODES = {torch.float8_e4m3fn: [0x7F, 0xFF], torch.float8_e5m2: [0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]}


@pytest.mark.parametrize("unified", [False, True], ids=["two_stage", "unified"])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.25, 3.0), (None, None)], ids=str)
@pytest.mark.parametrize("kv_dtype", FP8, ids=str)
def test_pool(mode, kv_dtype, scales, unified):
    mode.check(mode.case(kv_dtype=kv_dtype, k_scale=scales[0], v_scale=scales[1], unified=unified))


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_dtype", FP8, ids=str)
def test_query_types(mode, kv_dtype, dtype):
    """The bar of the query's type: an fp8 Q or P would miss it by far."""
    mode.check(mode.case(kv_dtype=kv_dtype, dtype=dtype, k_scale=0.5, v_scale=2.0))


@pytest.mark.parametrize("mode", modes("tiled", "packed_split3"), indirect=True)
@pytest.mark.parametrize("kv_dtype", FP8, ids=str)
def test_with_every_rule(mode, kv_dtype):
    rules = {"mask": "tree", "window": 150, "tree_positions": True, "sinks": torch.float32, "logit_cap": 4.0}
    mode.check(mode.case(kv_dtype=kv_dtype, k_scale=0.6, v_scale=1.7, temperature_len=9, mask_prefix=True, **rules))


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
@pytest.mark.parametrize("kv_dtype", FP8, ids=str)
def test_every_code_is_read_exactly(mode, kv_dtype):
    """One key a query, so the output is the value: all 256 codes, subnormals, zeros and infinities among them."""
    case = mode.case(
        lengths=[(4, 16)], heads=(1, 1), dim=16, kv_dtype=kv_dtype, mask="nothing", mask_prefix=True, v_scale=0.5
    )
    codes = torch.arange(256, dtype=torch.uint8, device=mode.device).view(16, 1, 16).view(kv_dtype)
    put(case.kwargs["v_buffer"], case.kwargs["kv_indices"][:16].long(), codes)
    put(case.kwargs["k_buffer"], case.kwargs["kv_indices"][:16].long(), torch.zeros_like(codes.float()).to(kv_dtype))
    case.kwargs["mask_indptr"] = torch.tensor([0, 80], device=mode.device)
    for first in range(0, 16, 4):
        mask = torch.zeros(4, 20, dtype=torch.bool, device=mode.device)
        for m in range(4):
            mask[m, first + m] = True
        got = mode.call(case.with_(custom_mask=mask.flatten()))[0][:4, 0].float()
        wanted = codes.float()[first : first + 4, 0] * 0.5
        exact = wanted.isfinite().all(dim=0)  # rows of a tile may share a column that is not finite
        assert torch.equal(got[:, exact], wanted[:, exact])
        assert not got[~wanted.isfinite()].isfinite().any()


@pytest.mark.parametrize("part", ["k_buffer", "v_buffer"])
@pytest.mark.parametrize("kv_dtype", FP8, ids=str)
def test_nan_codes_stay_nan(mode, kv_dtype, part):
    """A NaN that a query sees must show: turned into a number it would be a wrong answer that nobody notices."""
    for code in NAN_CODES[kv_dtype]:
        case = mode.case(lengths=[(2, 20)], heads=(1, 1), dim=16, kv_dtype=kv_dtype)
        slot = case.kwargs["kv_indices"][11].long()
        case.kwargs[part].view(torch.uint8)[slot, 0, 5] = code
        out = mode.call(case)[0][:2]
        assert out.isnan().all() if part == "k_buffer" else out[:, :, 5].isnan().all()


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
def test_query_is_not_rounded_to_fp8(mode):
    """Two queries that fp8 cannot tell apart must give different logits."""
    case = mode.case(
        lengths=[(2, 1)], heads=(1, 1), dim=16, kv_dtype=torch.float8_e4m3fn, causal=False, dtype=torch.float16
    )
    case.kwargs["q_extend"][:2] = 1.0
    case.kwargs["q_extend"][1] += 2.0**-6  # e4m3 steps by 2^-3 here
    put(
        case.kwargs["k_buffer"],
        case.kwargs["kv_indices"][:1].long(),
        torch.full((1, 1, 16), 8.0, device=mode.device).to(torch.float8_e4m3fn),
    )
    case.kwargs["k_extend"][:2] = 0.0
    case.kwargs["sm_scale"] = 1 / 128
    lse = mode.call(case, return_lse=True)[2][:2, 0].tolist()
    wanted = [math.log(2 + math.exp(1.0)), math.log(2 + math.exp(1.0 + 2.0**-6))]
    assert lse == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("mode", modes("tiled", "packed", interpreted=False), indirect=True)
@pytest.mark.parametrize("far", [0, 20, 32, 33, 60])
def test_query_keeps_its_range(mode, far):
    """Elements further apart than fp16 holds, where the largest meets zeros: a query scaled into fp16 would lose the
    others, and their logits with them."""
    case = mode.case(
        lengths=[(2, 3)], heads=(1, 1), dim=64, kv_dtype=torch.float8_e4m3fn, causal=False, dtype=torch.bfloat16
    )
    case.kwargs["q_extend"][:2] = 0.0
    case.kwargs["q_extend"][:2, :, 0] = 2.0**far
    case.kwargs["q_extend"][:2, :, 1] = 1.0
    case.kwargs["q_extend"][1, :, 1] = -1.9921875  # all eight bits of a mantissa
    keys = torch.zeros(3, 1, 64, device=mode.device)
    keys[:, 0, 1] = torch.tensor([1.0, 2.0, -1.0])
    put(case.kwargs["k_buffer"], case.kwargs["kv_indices"][:3].long(), keys.to(torch.float8_e4m3fn))
    case.kwargs["k_extend"][:2] = 0.0
    case.kwargs["sm_scale"] = 1.0
    lse = mode.call(case, return_lse=True)[2][:2, 0].tolist()
    wanted = [math.log(2 + sum(math.exp(q * k) for k in (1.0, 2.0, -1.0))) for q in (1.0, -1.9921875)]
    assert lse == pytest.approx(wanted, abs=1e-4)
