"""Accuracy at the shapes that were published, and of each type, where it costs something to be exact."""

from __future__ import annotations

import pytest
import torch
from cases import make_case
from modes import GPU, KERNELS, modes

# (batch, new tokens each, prefix, window), head dim 256, 8 query and 4 KV heads.
PUBLISHED = {
    "prefill_long": (1, 8192, 0, -1),
    "prefill_chat": (1, 1000, 0, -1),
    "prefill_multi": (4, 1000, 0, -1),
    "verify_chat": (32, 4, 1000, 1024),
    "verify_summ": (32, 4, 8000, 1024),
    "verify_burst": (32, 4, 64, 1024),
    "chunk8": (8, 512, 0, -1),
    "chunk16": (16, 1024, 0, -1),
    "chunk32": (32, 512, 0, -1),
}
PLANS = {"default": None, "sglang": "sglang", "sglang_legacy": "sglang-legacy", **KERNELS}


@pytest.mark.gpu
@pytest.mark.parametrize("row", PUBLISHED)
def test_published_shapes(row):
    """bf16 in, fp32 out: the largest error stays below 2e-3 of the largest output, for every plan that can run it."""
    batch, new, prefix, window = PUBLISHED[row]
    case = make_case(
        lengths=[(new, prefix)] * batch, heads=(8, 4), dim=256, window=window, dtype=torch.bfloat16,
        out_dtype=torch.float32, device="cuda", layout="plain",
    )  # fmt: skip
    expected = case.expected.out[case.expected.used]
    for name, plan in PLANS.items():
        if name.startswith("packed") and new > 512:
            continue  # slow, and nothing would choose it
        out, _, _ = GPU["tiled"].call(case, plan=plan)
        error = (out[case.expected.used] - expected).abs().max() / expected.abs().max()
        assert error < 2e-3, f"{name}: {error:.2e}"
        GPU["tiled"].check(case, plan=plan)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 256])
def test_long_prefixes(kernel, dtype, dim):
    """Thousands of keys: sums in fp32, products in IEEE fp32 where the inputs are fp32."""
    GPU[kernel].check(
        make_case(lengths=[(4, 6000), (70, 3000)], heads=(4, 2), dim=dim, dtype=dtype, device="cuda", flat=True)
    )


@pytest.mark.parametrize("mode", modes("tiled", "packed_split3"), indirect=True)
def test_fp32_is_not_tf32(mode):
    """TF32 keeps 10 bits: a key that differs in the 15th would give the same logit."""
    case = mode.case(lengths=[(1, 1)], heads=(1, 1), dim=16, dtype=torch.float32, layout="plain")
    case.kwargs["q_extend"].fill_(1.0)
    case.kwargs["k_extend"].fill_(1.0 + 2.0**-15)
    case.kwargs["k_buffer"].fill_(1.0)
    case.kwargs["sm_scale"] = 1.0
    case.kwargs["v_extend"].fill_(1.0 + 2.0**-15)
    case.kwargs["v_buffer"].fill_(1.0)
    out, _, lse = mode.call(case, return_lse=True)
    a, b = 16.0, 16.0 * (1.0 + 2.0**-15)
    wanted = torch.logaddexp(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)).item()
    assert abs(lse[0, 0].item() - wanted) < 5e-6
    weight = torch.sigmoid(torch.tensor(b - a)).item()
    assert abs(out[0, 0, 0].item() - (1.0 + weight * 2.0**-15)) < 2.5e-7


@pytest.mark.parametrize("mode", modes("tiled_gqa", "packed_split3"), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_do_not_drift(mode, dtype):
    """Equal logits and values: the average of equal numbers is that number, however many there are."""
    lengths = [(2, 9000)] if mode.gpu else [(2, 300)]
    case = mode.case(lengths=lengths, dtype=dtype, sm_scale=0.0, dim=32, heads=(2, 1))
    for name in ("v_extend", "v_buffer"):
        case.kwargs[name].fill_(0.7109375)  # a number of both types
    out = mode.call(case)[0][:2].double()
    assert (out - 0.7109375).abs().max() <= 2.0**-9


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
def test_one_dominant_key(mode):
    """A single key takes nearly all weight; the output is its value, whatever tile it lies in."""
    case = mode.case(lengths=[(3, 200)], heads=(2, 1), dim=32, dtype=torch.float32)
    slots = case.kwargs["kv_indices"].long()
    for at in (0, 17, 120, 199):
        case.kwargs["k_buffer"][slots[:200]] = 0.0
        case.kwargs["k_buffer"][slots[at]] = 40.0
        case.kwargs["q_extend"][:3] = 1.0
        case.kwargs["k_extend"][:3] = 0.0
        out = mode.call(case)[0][:3]
        wanted = case.kwargs["v_buffer"][slots[at]].repeat_interleave(2, dim=0).expand(3, -1, -1)
        torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-6)
