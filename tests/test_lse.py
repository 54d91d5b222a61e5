"""``return_lse``: the log of the denominator. Every test checks its values; here is what is special about it."""

from __future__ import annotations

import math

import pytest
import torch
from cases import make_case
from modes import modes


def test_none_is_returned_unless_asked(mode):
    assert mode.call(mode.case(lengths=[(5, 9)]))[2] is None


def test_shape_and_rows_outside(mode):
    case = mode.case(lead=2, beyond=3, lengths=[(5, 9), (0, 4), (18, 0)])
    out, buffer, lse = mode.call(case, return_lse=True)
    assert lse.dtype == torch.float32 and lse.shape == (case.tokens, case.spec.heads[0])
    assert torch.isneginf(lse[:2]).all() and torch.isneginf(lse[-3:]).all()
    assert torch.isfinite(lse[2:-3]).all()


@pytest.mark.parametrize("mode", modes("tiled", "packed_split3"), indirect=True)
@pytest.mark.parametrize("sinks", [None, torch.float32], ids=["no_sink", "sink"])
@pytest.mark.parametrize("unified", [False, True], ids=["two_stage", "unified"])
def test_rows_that_see_nothing(mode, sinks, unified):
    """Output 0; LSE -inf, or the sink where there is one."""
    case = mode.case(mask="nothing", mask_prefix=True, sinks=sinks, unified=unified)
    out, buffer, lse = mode.call(case, return_lse=True)
    used = case.expected.used
    assert (out[used] == 0).all()
    if sinks is None:
        assert torch.isneginf(lse[used]).all()
    else:
        torch.testing.assert_close(lse[used], case.kwargs["sinks"].float().expand(int(used.sum()), -1))


def test_it_comes_after_cap_and_temperature(mode):
    """One key, one query: the LSE is the logit itself, step by step."""
    case = mode.case(lengths=[(1, 20)], heads=(1, 1), dim=16, mask="nothing", logit_cap=2.0, temperature_len=4)
    case.kwargs.update(skip_prefix_custom_mask=False, k_scale=0.5)
    mask = torch.zeros(40, dtype=torch.bool, device=mode.device)
    mask[7] = True  # the only key that is seen
    case.kwargs.update(custom_mask=mask, mask_indptr=torch.tensor([0, 21], device=mode.device))
    lse = mode.call(case, return_lse=True)[2][0, 0].item()
    key = case.kwargs["k_buffer"][case.kwargs["kv_indices"][7].long(), 0].double()
    dot = float(case.kwargs["q_extend"][0, 0].double() @ key) * 0.5 * 16**-0.5
    assert lse == pytest.approx(2.0 * math.tanh(dot / 2.0) * math.log2(20) / math.log2(4), abs=2e-5)


@pytest.mark.parametrize("mode", modes("tiled", "packed_split3"), indirect=True)
def test_it_merges_two_calls(mode):
    """The reason to ask for it: attention over two halves of a prefix, merged by their LSEs, is attention over both."""
    case = mode.case(lengths=[(4, 300)], mask="nothing", dtype=torch.float32)
    slots = case.kwargs["kv_indices"]
    halves = []
    for part in (slots[:150], slots[150:300]):
        half = case.with_(kv_indices=part, kv_indptr=torch.tensor([0, 150], dtype=torch.int32, device=mode.device))
        half.kwargs["custom_mask"] = torch.zeros(4 * 154, dtype=torch.bool, device=mode.device)
        half.kwargs["mask_indptr"] = torch.tensor([0, 4 * 154], device=mode.device)
        out, _, lse = mode.call(half, return_lse=True)
        halves.append((out[:4].double(), lse[:4].double()))
    both = torch.logaddexp(halves[0][1], halves[1][1])
    merged = sum(out * torch.exp(lse - both)[..., None] for out, lse in halves)
    torch.testing.assert_close(merged, case.expected.out[:4], atol=1e-5, rtol=0)
    torch.testing.assert_close(both, case.expected.lse[:4], atol=1e-5, rtol=0)


@pytest.mark.parametrize("sink", [-80.0, 0.0, 80.0])
def test_sinks_of_any_size(mode, sink):
    """A sink far above every logit takes all the weight, one far below none; neither overflows."""
    case = mode.case(lengths=[(3, 20), (17, 0)], sinks=torch.float32)
    case.kwargs["sinks"] = torch.full_like(case.kwargs["sinks"], sink)
    out, buffer, lse = mode.call(case, return_lse=True)
    used = case.expected.used
    torch.testing.assert_close(lse[used].double(), case.expected.lse[used], atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(out[used].double(), case.expected.out[used], atol=2e-2 if mode.gpu else 1e-5, rtol=0)


@pytest.mark.parametrize("size", [30.0, 3000.0])
def test_large_logits_do_not_overflow(mode, size):
    case = mode.case(lengths=[(5, 40)], sm_scale=size, dtype=torch.float32)
    out, _, lse = mode.call(case, return_lse=True)
    used = case.expected.used
    torch.testing.assert_close(lse[used].double(), case.expected.lse[used], atol=0, rtol=1e-5)
    assert torch.isfinite(out[used]).all()


def test_case_builder_is_deterministic():
    """The oracle's answers would mean nothing if a case were not the same each time it is built."""
    one, two = make_case(seed=3, mask="tree"), make_case(seed=3, mask="tree")
    assert torch.equal(one.kwargs["kv_indices"], two.kwargs["kv_indices"])
    assert torch.equal(one.expected.out.nan_to_num(), two.expected.out.nan_to_num())
