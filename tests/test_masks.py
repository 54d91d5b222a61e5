"""Custom masks: who decides, where a row starts, and what a draft tree sees."""

from __future__ import annotations

import pytest
import torch
from cases import rebuild
from modes import KERNELS, modes

KINDS = ["tree", "random", "causal", "future", "nothing"]


@pytest.mark.parametrize("mode", modes(*KERNELS), indirect=True)
@pytest.mark.parametrize("mask_prefix", [False, True], ids=["extend_only", "prefix_too"])
@pytest.mark.parametrize("kind", KINDS)
def test_mask(mode, kind, mask_prefix):
    mode.check(mode.case(mask=kind, mask_prefix=mask_prefix))


@pytest.mark.parametrize("causal", [False, True])
def test_the_mask_alone_decides_over_new_tokens(mode, causal):
    """``is_causal`` cuts nothing from a mask, not even the tiles it would have skipped."""
    lengths = [(150, 20), (700, 0)] if mode.gpu else [(50, 7)]
    mode.check(mode.case(mask="future", causal=causal, lengths=lengths, heads=(2, 1)))


def test_is_causal_does_not_change_a_masked_call(mode):
    case = mode.case(mask="future", lengths=[(40, 8)])
    used = case.expected.used
    out, other = mode.call(case)[0], mode.call(case.with_(is_causal=False))[0]
    assert torch.equal(out[used], other[used])


@pytest.mark.parametrize("unified", [False, True])
def test_bytes(mode, unified):
    """uint8 masks mean what bool masks mean; any byte but 0 is True."""
    case = mode.case(mask="random", mask_prefix=True, mask_dtype=torch.uint8, unified=unified)
    mode.check(case)
    case.kwargs["custom_mask"] = case.kwargs["custom_mask"] * 255
    mode.check(case)


@pytest.mark.parametrize("unified", [False, True])
def test_mask_with_a_cut_prefix(mode, unified):
    """Two-stage rows begin with the columns of keys that are gone; unified rows do not."""
    window, cut = 300 if mode.gpu else 30, [0, 4, 0, 7, 31, 2, 1, 5]
    mode.check(mode.case(mask="random", mask_prefix=True, window=window, cut=cut, unified=unified))


def test_offsets_do_not_shift_a_mask_without_a_window(mode):
    mode.check(mode.case(mask="random", mask_prefix=True, cut=[9] * 8))


@pytest.mark.parametrize("mode", modes("tiled", "packed_split3"), indirect=True)
@pytest.mark.parametrize("window", [-1, 3, 200])
@pytest.mark.parametrize("positions", [False, True], ids=["by_row", "by_depth"])
def test_tree_verification(mode, window, positions):
    """A few nodes a sequence over longer prefixes: what speculative decoding calls at every step."""
    lengths = [(4, 50), (7, 0), (1, 33), (12, 61)]
    if mode.gpu:
        lengths = [(e, 20 * p) for e, p in lengths]
    elif mode.splits:
        lengths = [(4, 140), (7, 0), (1, 290)]
    mode.check(mode.case(lengths=lengths, mask="tree", window=window, tree_positions=positions, temperature_len=20))


def test_a_mask_of_ones_is_no_mask(mode):
    case = mode.case(mask="causal", lengths=[(20, 30), (3, 9)])
    plain = rebuild(case, mask=None)
    plain.kwargs.update({k: v for k, v in case.kwargs.items() if k not in ("custom_mask", "mask_indptr")})
    used = case.expected.used
    torch.testing.assert_close(mode.check(case)[used], mode.check(plain)[used], atol=1e-2 if mode.gpu else 1e-6, rtol=0)


@pytest.mark.parametrize("mode", modes("tiled", "packed_split3"), indirect=True)
def test_mask_pointers_without_a_mask_are_ignored(mode):
    case = mode.case(lengths=[(5, 20)])
    mode.check(case.with_(mask_indptr=torch.full((1,), -5, dtype=torch.int64, device=mode.device)))


def test_a_prefix_mask_is_skipped_by_default(mode):
    """Prefix columns of a mask count only with ``skip_prefix_custom_mask=False``, which is not the default."""
    case = mode.case(mask="nothing", lengths=[(6, 25)])
    del case.kwargs["skip_prefix_custom_mask"]
    out = mode.check(case)
    assert out[case.expected.used].abs().sum() > 0
