"""Two-stage extend attention: shapes, types, layouts and the rules of a logit, each against the oracle."""

from __future__ import annotations

import pytest
import torch
from cases import ONE_SHAPES, ONE_SHAPES_LARGE
from modes import KERNELS, modes

# One rule at a time; test_unified.py runs the same table on the unified function.
FEATURES = {
    "plain": {},
    "not_causal": {"causal": False},
    "cap": {"logit_cap": 3.0},
    "temperature": {"temperature_len": 12},
    "cap_then_temperature": {"logit_cap": 2.0, "temperature_len": 9},
    "sinks": {"sinks": torch.float32},
    "sinks_bf16": {"sinks": torch.bfloat16},
    "sinks_fp16": {"sinks": torch.float16},
    "scale": {"sm_scale": 0.05},
    "scale_zero": {"sm_scale": 0.0},
    "scale_negative": {"sm_scale": -0.2},
    "pool_scales": {"k_scale": 0.5, "v_scale": 3.0},
    "pool_scales_with_cap": {"k_scale": 0.5, "v_scale": -1.5, "logit_cap": 4.0},
    "no_pool_scales": {"k_scale": None, "v_scale": None},
    "everything": {
        "mask": "tree",
        "mask_prefix": True,
        "window": 21,
        "cut": [0, 5, 0, 40, 2],
        "tree_positions": True,
        "sinks": torch.float32,
        "logit_cap": 5.0,
        "temperature_len": 7,
        "k_scale": 0.7,
        "v_scale": 1.3,
    },
}


def fitted(mode, feature: dict) -> dict:
    """A row of FEATURES at the mode's size."""
    if mode.gpu and "cut" in feature:
        return {**feature, "cut": [0, 100, 3, 0, 64, 1, 500, 9], "window": 200}
    return {**feature, "window": 170} if mode.splits and "window" in feature else feature


@pytest.mark.parametrize("mode", modes(*KERNELS), indirect=True)
@pytest.mark.parametrize("feature", FEATURES)
def test_rule(mode, feature):
    mode.check(mode.case(**fitted(mode, FEATURES[feature])))


@pytest.mark.parametrize("lengths", ONE_SHAPES, ids=str)
def test_one_sequence(mode, lengths):
    mode.check(mode.case(lengths=[lengths], heads=(2, 1)))


@pytest.mark.parametrize("mode", modes(interpreted=False), indirect=True)
@pytest.mark.parametrize("lengths", ONE_SHAPES_LARGE, ids=str)
def test_one_long_sequence(mode, lengths):
    mode.check(mode.case(lengths=[lengths]))


@pytest.mark.parametrize("mode", modes("tiled_gqa", "packed"), indirect=True)
def test_many_sequences(mode):
    """More sequences than a kernel looks at in one step, most of them empty or tiny."""
    count = 36 if mode.kernel and not mode.gpu else 70
    lengths = [(i % 3 if i % 4 == 0 else 0, (7 * i) % 5) for i in range(count)]
    lengths[count - 3] = (9, 40)
    mode.check(mode.case(lengths=lengths, heads=(2, 1), dim=16))


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (5, 1), (7, 1), (8, 1), (6, 2), (10, 2), (4, 4)], ids=str)
def test_group_sizes(mode, heads):
    mode.check(mode.case(heads=heads, lengths=[(3, 30), (7, 3)]))


SMALL_DIMS = [(16, 16), (24, 24), (17, 33), (96, 80), (32, 64)]
DIMS = [(80, 80), (128, 128), (192, 128), (256, 256), (288, 256), (512, 512), (576, 512), (576, 576), (100, 20)]


@pytest.mark.parametrize("dims", SMALL_DIMS, ids=str)
def test_head_dims(mode, dims):
    mode.check(mode.case(dim=dims[0], dim_v=dims[1], lengths=[(3, 21), (20, 18)], heads=(4, 2)))


@pytest.mark.parametrize("mode", modes("tiled", "packed_split3"), indirect=True)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_large_head_dims(mode, dims):
    lengths = [(4, 1000), (130, 70)] if mode.gpu else [(2, 150)]
    mode.check(mode.case(dim=dims[0], dim_v=dims[1], lengths=lengths, heads=(2, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wide_output", [False, True], ids=["output_as_query", "output_fp32"])
def test_types(mode, dtype, wide_output):
    mode.check(mode.case(dtype=dtype, out_dtype=torch.float32 if wide_output else dtype))


def test_bf16_keeps_its_range(mode):
    """Values beyond fp16's range survive: bf16 is never narrowed to fp16."""
    case = mode.case(dtype=torch.bfloat16)
    for name in ("v_extend", "v_buffer"):
        case.kwargs[name] *= 2.0**20
    case.kwargs["q_extend"] *= 2.0**18
    case.kwargs["sm_scale"] = case.spec.dim**-0.5 * 2.0**-18
    mode.check(case)


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("indptr", [torch.int32, torch.int64], ids=str)
def test_index_types(mode, index, indptr):
    mode.check(mode.case(index_dtype=index, indptr_dtype=indptr, window=20, cut=[3] * 8))


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
def test_index_types_may_differ(mode):
    case = mode.case(index_dtype=torch.int32, indptr_dtype=torch.int64, mask="tree")
    case.kwargs["kv_indptr"] = case.kwargs["kv_indptr"].int()
    mode.check(case)


@pytest.mark.parametrize("layout", ["plain", "odd"])
@pytest.mark.parametrize("pool_layout", ["plain", "strided"])
def test_layouts(mode, layout, pool_layout):
    """Fused QKV slices are everywhere else; here contiguous tensors, unaligned row strides and an interleaved pool."""
    mode.check(mode.case(layout=layout, pool_layout=pool_layout, lengths=[(17, 33), (5, 0)]))


@pytest.mark.parametrize("lead", [0, 3])
@pytest.mark.parametrize("beyond", [0, 40])
def test_arrays_longer_than_used(mode, lead, beyond):
    """What lies before the first pointer and beyond the last is neither read nor written."""
    mode.check(
        mode.case(
            lead=lead, beyond=beyond, mask="random", mask_prefix=True, tree_positions=True, lengths=[(9, 20), (18, 0)]
        )
    )


@pytest.mark.parametrize("mode", modes("tiled", "packed_split3"), indirect=True)
def test_kv_indices_may_be_a_huge_bound(mode):
    """Engines pass a preallocated array: its size says nothing about the lengths."""
    case = mode.case(lengths=[(2, 260), (1, 3)])
    slots = case.kwargs["kv_indices"]
    mode.check(case.with_(kv_indices=torch.cat([slots, slots[-1:].expand(1_000_000)])))


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
@pytest.mark.parametrize("longer", ["q", "kv", "o"])
def test_row_counts_may_differ(mode, longer):
    """q, k and v, and o may each be longer than what is used, by different amounts."""
    case = mode.case(layout="plain", beyond=0, lengths=[(17, 8)])
    nan_rows = lambda t: torch.cat([t, torch.full_like(t[:1], float("nan")).expand(7, -1, -1)])  # noqa: E731
    out, _ = case.out()
    tokens = case.tokens
    if longer == "q":
        case.kwargs["q_extend"] = nan_rows(case.kwargs["q_extend"])
    elif longer == "kv":
        case.kwargs["k_extend"] = nan_rows(case.kwargs["k_extend"])
        case.kwargs["v_extend"] = nan_rows(nan_rows(case.kwargs["v_extend"]))
    else:
        out = nan_rows(out)
    out, _, lse = mode.call(case, out, return_lse=True)
    assert lse.shape == case.kwargs["q_extend"].shape[:2]
    assert torch.isneginf(lse[tokens:]).all() and torch.isnan(out[tokens:]).all()
    expected = case.expected.out[:tokens]
    torch.testing.assert_close(out[:tokens].double(), expected, atol=2e-2 if mode.gpu else 1e-5, rtol=0)


@pytest.mark.parametrize("bound", [34, 200])
def test_max_len_extend_is_only_a_bound(mode, bound):
    mode.check(mode.case(max_len_extend=bound, lengths=[(1, 20), (33, 16), (0, 4)], heads=(2, 1)))


@pytest.mark.parametrize("bound", [50, 5000])
def test_max_len_prefix_only_refines_the_plan(mode, bound):
    mode.check(mode.case(lengths=[(2, 50), (1, 0), (3, 17)]), max_len_prefix=bound)


@pytest.mark.parametrize("shape", ["k_buffer", "both"])
def test_no_prefix_does_not_read_the_pool(mode, shape):
    """Without indices the pools may have any shape and type: MLA's first chunk passes latent pools."""
    case = mode.case(lengths=[(17, 0), (1, 0)], beyond=0)
    assert case.kwargs["kv_indices"].numel() == 0
    case.kwargs["k_buffer"] = torch.full((3, 1, 576), 77, dtype=torch.int16, device=mode.device)
    if shape == "both":
        case.kwargs["v_buffer"] = torch.zeros(0, dtype=torch.uint8, device=mode.device)
    mode.check(case)


@pytest.mark.parametrize(
    "lengths", [[], [(0, 0)], [(0, 12), (0, 0)]], ids=["no_sequence", "one_empty", "only_prefixes"]
)
def test_nothing_to_do(mode, lengths):
    out = mode.check(mode.case(lengths=lengths))
    assert torch.isnan(out).all()


@pytest.mark.parametrize("mode", modes("tiled", "packed"), indirect=True)
def test_no_rows_at_all(mode):
    case = mode.case(lengths=[(0, 0)], beyond=0)
    out, _, lse = mode.call(case, return_lse=True)
    assert out.numel() == 0 and lse.shape == (0, case.spec.heads[0])


def test_repeats_hold_the_same_bits(mode):
    case = mode.case()
    used = case.expected.used
    first, again = mode.call(case)[0][used], mode.call(case)[0][used]
    assert torch.equal(first, again)


def test_inputs_are_left_alone(mode):
    case = mode.case(**fitted(mode, FEATURES["everything"]))
    bits = lambda t: t.contiguous().view(torch.uint8)  # noqa: E731
    before = {name: t.clone() for name, t in case.kwargs.items() if isinstance(t, torch.Tensor)}
    mode.call(case)
    for name, tensor in before.items():
        assert torch.equal(bits(case.kwargs[name]), bits(tensor)), name
