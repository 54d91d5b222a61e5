"""Latent attention (MLA): V is the first columns of K, in the pool and in the new tokens, with one KV head."""

from __future__ import annotations

import pytest
import torch
from cases import FP8
from modes import modes


@pytest.mark.parametrize("unified", [False, True], ids=["two_stage", "unified"])
@pytest.mark.parametrize("dims", [(48, 32), (32, 32), (40, 17)], ids=str)
def test_aliasing_values(mode, dims, unified):
    case = mode.case(alias=True, dim=dims[0], dim_v=dims[1], heads=(4, 1), unified=unified)
    assert case.kwargs["v_buffer"].data_ptr() == case.kwargs["k_buffer"].data_ptr()
    mode.check(case)


@pytest.mark.parametrize("mode", modes("tiled_gqa", "packed_split3"), indirect=True)
@pytest.mark.parametrize("unified", [False, True], ids=["two_stage", "unified"])
def test_real_dims(mode, unified):
    lengths = [(4, 1000), (65, 100)] if mode.gpu else [(2, 150)]
    mode.check(mode.case(alias=True, dim=576, dim_v=512, heads=(16, 1), lengths=lengths, unified=unified))


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
def test_real_dims_in_half_precision(mode):
    mode.check(mode.case(alias=True, dim=576, dim_v=512, heads=(8, 1), lengths=[(2, 40)], dtype=torch.float16))


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, 0.5), (0.5, 2.0)], ids=str)
@pytest.mark.parametrize("kv_dtype", [None, *FP8], ids=str)
def test_scales_of_an_aliased_pool(mode, kv_dtype, scales):
    """K and V are the same bytes with a scale each."""
    case = mode.case(
        alias=True, dim=48, dim_v=32, heads=(4, 1), kv_dtype=kv_dtype, k_scale=scales[0], v_scale=scales[1]
    )
    mode.check(case)


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
@pytest.mark.parametrize("only", ["pool", "new"])
def test_one_side_may_alias_alone(mode, only):
    """Equal values in memory of their own must not be mistaken for an alias, nor an alias missed."""
    case = mode.case(alias=True, dim=48, dim_v=32, heads=(4, 1))
    name = "v_extend" if only == "pool" else "v_buffer"
    separate = case.kwargs[name].clone()
    case.kwargs[name] = separate * 2
    mode.check(case)


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
def test_values_inside_keys_but_not_in_front(mode):
    """V as the *last* columns of K shares the memory and is no alias of the first."""
    case = mode.case(alias=True, dim=48, dim_v=32, heads=(2, 1))
    for k, v in (("k_buffer", "v_buffer"), ("k_extend", "v_extend")):
        case.kwargs[v] = case.kwargs[k][:, :, 16:]
    mode.check(case)


def test_a_wider_head_than_its_values_without_an_alias(mode):
    """The decompressed form of the first chunk: Dq 192, Dv 128 in miniature; the latent pools are not read."""
    case = mode.case(dim=24, dim_v=16, heads=(4, 4), lengths=[(17, 0), (3, 0)], beyond=0)
    case.kwargs["k_buffer"] = torch.zeros(5, 1, 576, device=mode.device)
    case.kwargs["v_buffer"] = case.kwargs["k_buffer"][:, :, :512]
    mode.check(case)
