"""The situations that SGLang's suite for its Triton attention puts its functions into, with this import.

Extend with and without a mask against whole-sequence attention, sliding windows, context (no prefix) against PyTorch's
own attention, one query over a long prefix (decode, grouped and latent), a ragged grid, the unified function against
the two-stage one, index building (test_unified.py), and a chunk whose window starts off a tile. Sizes are theirs on a
GPU and small ones elsewhere; tolerances are theirs, and the accuracy bar of bars.py on top.
"""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from bars import assert_accurate
from cases import make_case, rebuild
from modes import modes

import extend_attn


def _random_lengths(batch, context, seed=42):
    """Prefixes and new tokens of 1 to half the context, as that suite draws them."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randint(1, context // 2, (batch,), generator=random).tolist()  # noqa: E731
    return list(zip(draw(), draw()))


def _theirs(mode, batch, context, heads, **spec):
    """(B, N_CTX, heads) of that suite on a GPU; a miniature elsewhere."""
    if not mode.gpu:
        batch, context = (2, 40) if mode.kernel else (5, 120)
        heads = (heads[0] // heads[1], 1) if heads[0] > 16 else heads
    lengths = _random_lengths(batch, context)
    return mode.case(lengths=lengths, heads=heads, flat=True, layout="plain", **spec)


def _close(case, out, rtol, atol):
    used = case.expected.used
    assert torch.allclose(out[used].double(), case.expected.out[used], rtol=rtol, atol=atol)


@pytest.mark.parametrize("mode", modes("tiled", "tiled_gqa"), indirect=True)
@pytest.mark.parametrize("dim", [256, 128, 96, 80, 17])
def test_extend(mode, dim):
    """Their 13 lies below the head dims of this library; 17 is as odd."""
    dim = dim if mode.gpu or dim < 128 or not mode.kernel else dim // 4
    context = 12331 if dim == 128 else 3000
    case = _theirs(mode, 19, context, (12, 4), dim=dim)
    _close(case, mode.check(case), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
def test_extend_with_a_causal_mask(mode):
    case = _theirs(mode, 19, 2000, (12, 4), dim=128 if mode.gpu else 32, mask="causal")
    _close(case, mode.check(case), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
@pytest.mark.parametrize("dim", [128, 80])
def test_extend_against_redundant_attention(mode, dim):
    """The whole-sequence check that engines use: sequences contiguous in the pool, the rest dropped."""
    lengths = _random_lengths(*((9, 2000) if mode.gpu else (3, 40)))
    heads, dim = ((12, 4), dim) if mode.gpu else ((4, 2), dim // 4)
    case = mode.case(lengths=lengths, heads=heads, dim=dim, flat=True, extend_from_pool=True, layout="plain", beyond=0)
    totals = [e + p for e, p in lengths]
    starts = [0, *accumulate(totals)][:-1]
    rows = sum(totals)
    ints = lambda values: torch.tensor(values, dtype=torch.int32, device=mode.device)  # noqa: E731
    pools = {}
    for pool, new in (("k_buffer", "k_extend"), ("v_buffer", "v_extend")):
        whole = torch.zeros(rows, heads[1], dim, dtype=mode.dtype, device=mode.device)
        at_prefix = at_new = 0
        for (e, p), start in zip(lengths, starts):
            slots = case.kwargs["kv_indices"][at_prefix : at_prefix + p].long()
            whole[start : start + p] = case.kwargs[pool][slots]
            whole[start + p : start + p + e] = case.kwargs[new][at_new : at_new + e]
            at_prefix, at_new = at_prefix + p, at_new + e
        pools[pool] = whole
    out, buffer = case.out()
    assert extend_attn.redundant_attention(
        case.kwargs["q_extend"], out, pools["k_buffer"], pools["v_buffer"], ints(list(range(len(lengths)))),
        ints(starts), ints(totals), ints([p for _, p in lengths]), max(totals),
    ) is None  # fmt: skip
    _close(case, out, rtol=1e-2, atol=1e-3)
    _close(case, mode.check(case), rtol=1e-2, atol=1e-3)
    assert_accurate(out, case)


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
@pytest.mark.parametrize("window", [-1, 127])
def test_sliding_window(mode, window):
    window = window if mode.gpu or window < 0 else 11
    case = _theirs(mode, 19, 3000, (64, 8), dim=128 if mode.gpu else 32, window=window)
    _close(case, mode.check(case), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim", [128, 96, 80, 17])
def test_context(mode, dim, causal):
    """Whole prompts without a prefix, in fp32, against PyTorch's attention."""
    case = mode.case(lengths=[(8, 0), (12, 0)], heads=(4, 4), dim=dim, causal=causal, dtype=torch.float32, beyond=0)
    out = mode.check(case)
    for rows in (slice(0, 8), slice(8, 20)):
        q, k, v = (case.kwargs[n][rows].transpose(0, 1) for n in ("q_extend", "k_extend", "v_extend"))
        wanted = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(0, 1)
        assert F.cosine_similarity(out[rows].flatten(), wanted.flatten(), dim=0) > 1 - 1e-5
        torch.testing.assert_close(out[rows], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", modes("packed", "packed_split3"), indirect=True)
@pytest.mark.parametrize("heads, dim", [((4, 4), 64), ((4, 2), 64), ((4, 4), 80), ((4, 4), 17)], ids=str)
def test_decode(mode, heads, dim):
    """One new token over ten keys: what a decode step is here."""
    dim = dim if mode.gpu or dim == 17 else dim // 4
    case = mode.case(lengths=[(1, 9), (1, 9)], heads=heads, dim=dim)
    _close(case, mode.check(case), rtol=1e-2, atol=1e-2)


GROUPED = [((16, 16), 64, 64), ((16, 1), 64, 64), ((64, 1), 17, 17), ((128, 1), 80, 80), ((128, 2), 512, 512)]


@pytest.mark.parametrize("mode", modes("packed", "packed_split3", interpreted=False), indirect=True)
@pytest.mark.parametrize("keys", [5, 100, 128, 500])
@pytest.mark.parametrize("heads, dim, dim_v", [*GROUPED, ((128, 1), 576, 512)], ids=str)
def test_grouped_decode(mode, heads, dim, dim_v, keys):
    case = mode.case(lengths=[(1, keys - 1)] * 2, heads=heads, dim=dim, dim_v=dim_v)
    out = mode.check(case)
    used = case.expected.used
    wanted = case.expected.out[used]
    assert F.cosine_similarity(out[used].double().flatten(), wanted.flatten(), dim=0) > 0.9999
    torch.testing.assert_close(out[used].double(), wanted, atol=3e-2, rtol=0)


def test_a_ragged_grid(mode):
    """Lengths from one token to many tiles in one batch."""
    lengths = [(1, 8), (7, 16), (13, 32), (129 if mode.gpu else 40, 64)]
    heads = (8, 2) if mode.gpu else (2, 1)
    case = mode.case(lengths=lengths, heads=heads, flat=True, dim=64 if mode.gpu else 16)
    _close(case, mode.check(case), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
@pytest.mark.parametrize(
    "batch, context, heads, dim", [(4, 512, (32, 8), 128), (2, 2048, (32, 8), 128), (8, 256, (64, 8), 80)]
)
def test_unified_against_two_stage(mode, batch, context, heads, dim):
    two = _theirs(mode, batch, context, heads, dim=dim if mode.gpu else dim // 4, extend_from_pool=True)
    one = rebuild(two, unified=True)
    used = two.expected.used
    torch.testing.assert_close(mode.check(one)[used], mode.check(two)[used], rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("mode", modes("tiled_gqa", "packed"), indirect=True)
def test_a_chunk_whose_window_starts_off_a_tile(mode):
    """The last chunk of a prompt, its prefix cut to the window at any offset, gives the rows of the whole prompt."""
    length, window, starts = (3000, 128, [2192, 2205, 2900]) if mode.gpu else (70, 12, [40, 53, 66])
    heads = (8, 8) if mode.gpu else (2, 1)
    whole = make_case(
        lengths=[(length, 0)] * 3, heads=heads, dim=64 if mode.gpu else 16, window=window, unified=True,
        dtype=mode.dtype, device=mode.device, layout="plain", beyond=0,
    )  # fmt: skip
    slots = whole.kwargs["kv_indices"].view(3, length)
    cut = [start - window for start in starts]
    chunk = make_case(
        lengths=[(length - start, window) for start in starts], heads=heads, dim=whole.spec.dim, window=window,
        unified=True, cut=cut, dtype=mode.dtype, device=mode.device, layout="plain", beyond=0,
    )  # fmt: skip
    rows = torch.cat([torch.arange(b * length + start, (b + 1) * length) for b, start in enumerate(starts)])
    chunk.kwargs.update({name: whole.kwargs[name] for name in ("k_buffer", "v_buffer")})
    chunk.kwargs["q"] = whole.kwargs["q"][rows.to(mode.device)]
    chunk.kwargs["kv_indices"] = torch.cat([slots[b, c:] for b, c in enumerate(cut)])
    wanted = whole.expected.out[rows.to(mode.device)]
    torch.testing.assert_close(chunk.expected.out, wanted, atol=1e-12, rtol=0)
    mode.check(chunk)
