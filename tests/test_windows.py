"""Sliding windows, cut prefixes, and positions that are not rows."""

from __future__ import annotations

import pytest
import torch
from cases import rebuild
from modes import modes


def _cut(mode):
    return [0, 100, 3, 0, 64, 1, 500, 9] if mode.gpu else [0, 6, 2, 40, 0]


@pytest.mark.parametrize("mode", modes("tiled", "tiled_gqa", "packed_split3"), indirect=True)
@pytest.mark.parametrize("unified", [False, True], ids=["two_stage", "unified"])
@pytest.mark.parametrize("window", [1, 15, 16, 17, 64, 140, 1000])
def test_window(mode, window, unified):
    mode.check(mode.case(window=window, unified=unified))


@pytest.mark.parametrize("window", [0, -1, -5])
def test_no_window(mode, window):
    """0 and below is no window, and then ``w_b`` is not read: not in a mask's stride, not in the temperature."""
    mode.check(mode.case(window=window, cut=_cut(mode), mask="random", mask_prefix=True, temperature_len=10))


@pytest.mark.parametrize("unified", [False, True], ids=["two_stage", "unified"])
@pytest.mark.parametrize("causal", [False, True])
def test_cut_prefix(mode, causal, unified):
    mode.check(mode.case(window=25, cut=_cut(mode), causal=causal, unified=unified))


def test_window_counts_its_own_token(mode):
    """``W`` means W + 1 keys: a query at position 5 with W = 2 sees 3, 4 and 5."""
    case = mode.case(lengths=[(1, 5)], heads=(1, 1), window=2, sm_scale=0.0, layout="plain")
    out = mode.check(case)
    slots = case.kwargs["kv_indices"][:5].long()
    values = torch.cat([case.kwargs["v_buffer"][slots[3:]], case.kwargs["v_extend"][:1]]).float()
    torch.testing.assert_close(out[:1].float(), values.mean(0, keepdim=True), atol=1e-2 if mode.gpu else 1e-6, rtol=0)


def test_cutting_what_no_query_sees_changes_nothing(mode):
    """An engine gives only the last keys of a prefix, with ``w_b``; the answer is that of the whole prefix."""
    prefix, new, window = (900, 33, 128) if mode.gpu else (90, 9, 20)
    cut = prefix - window
    whole = mode.case(lengths=[(new, prefix)], window=window, temperature_len=16)
    short = rebuild(whole, lengths=[(new, window)], cut=[cut])
    short.kwargs.update({n: whole.kwargs[n] for n in ("q_extend", "k_extend", "v_extend", "k_buffer", "v_buffer")})
    short.kwargs["kv_indices"] = whole.kwargs["kv_indices"][cut:]
    used = whole.expected.used
    torch.testing.assert_close(short.expected.out[used], whole.expected.out[used], atol=1e-12, rtol=0)
    mode.check(whole)
    mode.check(short)


@pytest.mark.parametrize("mode", modes("tiled_gqa", "packed_split3"), indirect=True)
@pytest.mark.parametrize("unified", [False, True], ids=["two_stage", "unified"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [2, 140])
def test_positions_count_in_the_window_rule(mode, window, causal, unified):
    """Nodes of one depth share a position; causality still goes by row."""
    mode.check(mode.case(window=window, tree_positions=True, causal=causal, cut=_cut(mode), unified=unified))


def test_positions_of_new_tokens_may_be_anything(mode):
    """Far ahead of their keys, behind them, or in any order: only the rules' arithmetic counts."""
    lengths = [(20, 30), (9, 17), (5, 40)]
    case = mode.case(lengths=lengths, window=12, causal=False)
    values = torch.tensor([70 - 3 * m for m in range(20)] + [10 + m % 2 for m in range(9)] + [500, 0, 41, 41, 7])
    case.kwargs["q_positions"] = torch.cat([values, torch.full((8,), 10**6)]).to(mode.device, torch.int32)
    mode.check(case)


@pytest.mark.parametrize("unified", [False, True], ids=["two_stage", "unified"])
def test_positions_count_in_the_temperature(mode, unified):
    """With ``q_positions`` the true position, not the row, scales a logit."""
    case = mode.case(lengths=[(6, 30), (4, 3)], temperature_len=8, unified=unified)
    positions = [1000, 1000, 9, 8, 7, 0, 64, 64, 65, 2]
    case.kwargs["q_positions"] = torch.tensor(positions + [5] * 5, device=mode.device, dtype=torch.int32)
    mode.check(case)


@pytest.mark.parametrize("length", [2, 3, 16, 40, 1024])
def test_temperature_starts_past_its_length(mode, length):
    mode.check(mode.case(temperature_len=length, window=50 if length == 16 else -1))


@pytest.mark.parametrize("mode", modes("tiled", "packed_split3"), indirect=True)
@pytest.mark.parametrize("off", [-1, -2])
def test_no_temperature(mode, off):
    """A negative length is off."""
    mode.check(mode.case(temperature_len=off))


def test_a_window_that_no_prefix_key_is_in(mode):
    """Offsets so large that every prefix key is out of sight are legal: the new tokens are left."""
    case = mode.case(lengths=[(8, 20), (3, 5)], window=4)
    case.kwargs["q_positions"] = torch.arange(1000, 1016, device=mode.device, dtype=torch.int32)
    mode.check(case)
