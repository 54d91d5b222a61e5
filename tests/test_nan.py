"""What nobody sees never reaches the output, whatever it holds.

Every case of these tests is poisoned already (see cases.py); here the poison lies where a tile has to load next to it.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import FP8, put
from modes import modes

BAD = [math.nan, math.inf, -math.inf]


def _poison_rows(case, names, rows, bad):
    for name in names:
        case.kwargs[name][rows] = bad


@pytest.mark.parametrize("mode", modes("tiled", "packed_split3"), indirect=True)
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_prefix_keys_behind_the_window(mode, bad):
    case = mode.case(lengths=[(3, 300), (5, 190)], window=150)
    slots = case.kwargs["kv_indices"].long()
    hidden = torch.cat([slots[: 300 - 150], slots[300 : 300 + 190 - 150]])
    _poison_rows(case, ("k_buffer", "v_buffer"), hidden, bad)
    mode.check(case)


@pytest.mark.parametrize("unified", [False, True], ids=["two_stage", "unified"])
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_prefix_keys_that_the_mask_hides(mode, bad, unified):
    case = mode.case(lengths=[(5, 40)], mask="random", mask_prefix=True, unified=unified)
    width = 45
    mask = case.kwargs["custom_mask"][: 5 * width].view(5, width)
    mask[:, 3:20:2] = False
    mask[:, 30:34] = False
    hidden = case.kwargs["kv_indices"][:40].long()[~mask[:, :40].any(dim=0)]
    assert hidden.numel() >= 13
    _poison_rows(case, ("k_buffer", "v_buffer"), hidden, bad)
    mode.check(case)


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_new_tokens_that_the_mask_hides_from_all(mode, bad):
    """A padded draft: rows that exist and that no query, not even their own, sees."""
    case = mode.case(lengths=[(20, 12), (3, 0)], mask="random")
    stride = 32
    mask = case.kwargs["custom_mask"][: 20 * stride].view(20, stride)
    mask[:, 12 + 7] = False
    mask[:, 12 + 15 :] = False
    _poison_rows(case, ("k_extend", "v_extend"), [7, 15, 16, 17, 18, 19], bad)
    mode.check(case)


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_positions_that_put_a_key_outside_every_window(mode, bad):
    case = mode.case(lengths=[(18, 30)], window=8, mask="random", mask_prefix=True)
    case.kwargs["custom_mask"] = torch.ones_like(case.kwargs["custom_mask"])
    positions = torch.arange(100, 121)
    positions[4] = 60  # no other query may look back that far; its own row must see something finite
    case.kwargs["q_positions"] = positions.to(mode.device, torch.int32)
    mask = case.kwargs["custom_mask"][: 18 * 48].view(18, 48)
    mask[4, :] = False
    mask[4, 30 + 5] = True
    mask[:, 30 + 4] = False
    _poison_rows(case, ("k_extend", "v_extend"), 4, bad)
    _poison_rows(case, ("k_buffer", "v_buffer"), case.kwargs["kv_indices"][:30].long(), bad)
    mode.check(case)


@pytest.mark.parametrize("unified", [False, True], ids=["two_stage", "unified"])
def test_another_sequence_may_be_broken(mode, unified):
    """One sequence full of NaN: it alone is NaN. Its neighbours share tiles of memory, never of keys."""
    lengths = [(9, 35), (17, 20), (1, 15)]
    case = mode.case(lengths=lengths, unified=unified, layout="plain")
    clean, _, clean_lse = mode.call(case, return_lse=True)
    if unified:
        starts = case.kwargs["kv_indptr"].tolist()
        broken = case.kwargs["kv_indices"][starts[1] : starts[2]].long()
    else:
        broken = case.kwargs["kv_indices"][35:55].long()
        _poison_rows(case, ("k_extend", "v_extend"), slice(9, 26), math.nan)
    _poison_rows(case, ("k_buffer", "v_buffer"), broken, math.nan)
    out, _, lse = mode.call(case, return_lse=True)
    assert out[9:26].isnan().all()
    for rows in (slice(0, 9), slice(26, 27)):
        assert torch.equal(out[rows], clean[rows]) and torch.equal(lse[rows], clean_lse[rows])


def test_later_tokens_of_a_causal_sequence(mode):
    """A key that only the last row sees does not reach the rows before it."""
    case = mode.case(lengths=[(80, 10)] if not mode.gpu else [(600, 10)], heads=(2, 1))
    last = case.spec.lengths[0][0] - 1
    case.kwargs["k_extend"][last] = math.nan
    out = mode.call(case)[0]
    assert out[:last].isfinite().all() and out[last].isnan().all()
    used = case.expected.used.clone()
    used[last] = False
    bar = 2e-2 if mode.gpu else 1e-5
    torch.testing.assert_close(out[used].double(), case.expected.out[used], atol=bar, rtol=0)


@pytest.mark.parametrize("name", ["k_buffer", "v_buffer", "k_extend", "v_extend"])
def test_a_nan_that_a_query_sees_shows(mode, name):
    """The promise is about what is not seen; what is seen must not be hidden."""
    case = mode.case(lengths=[(1, 20)], heads=(2, 1))
    row = case.kwargs["kv_indices"][3].long() if "buffer" in name else 0
    case.kwargs[name][row, 0, 1] = math.nan
    out = mode.call(case)[0][0]
    assert out[:, 1].isnan().all() if name.startswith("v") else out.isnan().all()


@pytest.mark.parametrize("mode", modes("tiled", "packed_split3"), indirect=True)
def test_slots_next_to_used_ones(mode):
    """Slots in order, every second one unused and NaN: what a tile of consecutive slots would read."""
    case = mode.case(lengths=[(4, 280)], beyond=0)
    pool = {n: torch.full_like(case.kwargs[n][:1], math.nan).repeat(561, 1, 1) for n in ("k_buffer", "v_buffer")}
    for name, wide in pool.items():
        wide[1:560:2] = case.kwargs[name][case.kwargs["kv_indices"].long()]
    mode.check(case.with_(**pool, kv_indices=torch.arange(1, 560, 2, device=mode.device)))


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
@pytest.mark.parametrize("kv_dtype", FP8, ids=str)
def test_hidden_fp8_codes(mode, kv_dtype):
    case = mode.case(lengths=[(3, 50)], window=10, kv_dtype=kv_dtype)
    hidden = case.kwargs["kv_indices"][:40].long()
    for name in ("k_buffer", "v_buffer"):
        like = case.kwargs[name][:1].view(torch.uint8)
        put(case.kwargs[name], hidden, torch.full_like(like, 0x7F).repeat(40, 1, 1).view(kv_dtype))
    mode.check(case)
