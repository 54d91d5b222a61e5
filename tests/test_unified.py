"""The unified function, its index builder, and that it is the two-stage function in another form."""

from __future__ import annotations

import inspect

import pytest
import torch
from bars import assert_right, ulp
from cases import ONE_SHAPES, make_case, rebuild
from modes import modes
from test_extend import FEATURES, fitted

import extend_attn

FEW = [(2, 33), (17, 5), (0, 7)]


@pytest.mark.parametrize(
    "mode",
    modes("tiled_gqa", "packed_split3") + modes("tiled", "packed", reference=False, interpreted=False),
    indirect=True,
)
@pytest.mark.parametrize("feature", FEATURES)
def test_rule(mode, feature):
    mode.check(mode.case(unified=True, **fitted(mode, FEATURES[feature])))


@pytest.mark.parametrize("mode", modes("tiled_gqa", "packed"), indirect=True)
@pytest.mark.parametrize("lengths", ONE_SHAPES, ids=str)
def test_one_sequence(mode, lengths):
    mode.check(mode.case(unified=True, lengths=[lengths], heads=(2, 1)))


@pytest.mark.parametrize("kind", ["tree", "random", "future", "nothing"])
def test_mask_covers_prefix_and_new_tokens(mode, kind):
    mode.check(mode.case(unified=True, mask=kind))


@pytest.mark.parametrize("mode", modes("tiled_gqa", "packed"), indirect=True)
@pytest.mark.parametrize("lead", [0, 2])
@pytest.mark.parametrize("indptr", [torch.int32, torch.int64], ids=str)
def test_arrays_longer_than_used(mode, lead, indptr):
    mode.check(mode.case(unified=True, lead=lead, beyond=30, lengths=FEW, indptr_dtype=indptr, mask="random"))


@pytest.mark.parametrize("mode", modes("tiled", "packed_split3"), indirect=True)
@pytest.mark.parametrize("dims", [(16, 16), (96, 80), (192, 128), (576, 512)], ids=str)
def test_head_dims(mode, dims):
    mode.check(mode.case(unified=True, dim=dims[0], dim_v=dims[1], lengths=[(3, 30)], heads=(3, 1)))


@pytest.mark.parametrize("mode", modes("tiled_gqa", "packed"), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_types(mode, dtype):
    mode.check(mode.case(unified=True, dtype=dtype, lengths=FEW))
    mode.check(mode.case(unified=True, dtype=dtype, lengths=FEW, out_dtype=torch.float32))


@pytest.mark.parametrize(
    "lengths", [[], [(0, 0)], [(0, 12), (0, 0)]], ids=["no_sequence", "one_empty", "only_prefixes"]
)
def test_nothing_to_do(mode, lengths):
    assert torch.isnan(mode.check(mode.case(unified=True, lengths=lengths))).all()


@pytest.mark.parametrize("bound", [18, 90])
def test_max_len_extend_is_only_a_bound(mode, bound):
    mode.check(mode.case(unified=True, lengths=FEW, max_len_extend=bound), max_len_prefix=100)


# --- the same answer as two-stage -------------------------------------------------------------------------------------

EQUAL = {
    "plain": {},
    "window_and_temperature": {"window": 12, "cut": [3, 0, 9], "temperature_len": 6},
    "tree": {"mask": "tree", "tree_positions": True, "window": 9, "sinks": torch.float32, "logit_cap": 3.0},
    "mask": {"mask": "random", "causal": False},
    "fp8": {"kv_dtype": torch.float8_e4m3fn, "k_scale": 0.5, "v_scale": 2.0, "window": 14, "cut": [0, 2, 4]},
    "alias": {"alias": True, "dim": 48, "dim_v": 32, "heads": (4, 1)},
}


@pytest.mark.parametrize("mode", modes("tiled_gqa", "packed"), indirect=True)
@pytest.mark.parametrize("kind", EQUAL)
def test_equals_two_stage(mode, kind):
    """Where the pool's rows for the new tokens, dequantised, are ``k_extend`` and ``v_extend``."""
    two = mode.case(extend_from_pool=True, mask_prefix=True, lengths=[(5, 40), (3, 0), (9, 25)], **EQUAL[kind])
    one = rebuild(two, unified=True)
    used = two.expected.used
    torch.testing.assert_close(one.expected.out[used], two.expected.out[used], atol=1e-12, rtol=0)
    assert used.any() and torch.equal(used, one.expected.used)
    largest = two.expected.out[used].abs().max().item()
    gap = (mode.check(one)[used].double() - mode.check(two)[used].double()).norm()
    assert gap <= 2e-5 * two.expected.out[used].norm() if not mode.gpu else gap <= 300 * ulp(largest, mode.dtype)


# --- build_unified_kv_indices ----------------------------------------------------------------------------------------


def _tensor(values, dtype, device):
    return torch.tensor(values, dtype=dtype, device=device)


@pytest.mark.parametrize(
    "mode", modes(interpreted=False, gpu=False) + modes("tiled", reference=False, interpreted=False), indirect=True
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("beyond", [0, 5])
@pytest.mark.parametrize(
    "lengths", [[(5, 10), (3, 20), (7, 15), (4, 25)], [(0, 0), (2, 0), (0, 3), (0, 0)], [(0, 0)], []], ids=str
)
def test_build_unified_kv_indices(mode, lengths, beyond, dtype):
    prefix, new = [p for _, p in lengths], [e for e, _ in lengths]
    prefix_slots = [[100 * b + 99 - j for j in range(p)] for b, p in enumerate(prefix)]
    # the new tokens' slots need not lie in the order of the batch
    starts = [sum(new[b + 1 :]) for b in range(len(new))]
    new_slots = [0] * sum(new)
    for b, start in enumerate(starts):
        new_slots[start : start + new[b]] = [1000 * b + m for m in range(new[b])]
    garbage = [-1] * beyond
    indptr = [sum(prefix[:b]) for b in range(len(prefix) + 1)]
    flat = [slot for slots in prefix_slots for slot in slots]
    make = lambda values: _tensor(values + garbage, dtype, mode.device)  # noqa: E731
    got_indptr, got, got_prefix = extend_attn.build_unified_kv_indices(
        make(indptr), make(flat), make(starts), make(new), make(new_slots), len(lengths)
    )
    totals = [p + e for e, p in lengths]
    assert got_indptr.tolist() == [sum(totals[:b]) for b in range(len(totals) + 1)]
    assert got_prefix.tolist() == prefix
    wanted = [s for b in range(len(lengths)) for s in prefix_slots[b] + [1000 * b + m for m in range(new[b])]]
    assert got[: sum(totals)].tolist() == wanted
    assert {got_indptr.dtype, got_prefix.dtype, got.dtype} <= {torch.int32, torch.int64}


def test_built_indices_go_straight_in(mode):
    """The builder's three results are the unified function's arguments, its padding included."""
    lengths = [(4, 30), (1, 0), (9, 7)]
    case = mode.case(lengths=lengths, unified=True, beyond=0)
    slots, starts = case.kwargs["kv_indices"], case.kwargs["kv_indptr"].tolist()
    prefix = torch.cat([slots[s : s + p] for s, (_, p) in zip(starts, lengths)])
    new = torch.cat([slots[s + p : s + p + e] for s, (e, p) in zip(starts, lengths)])
    ints = lambda values: torch.tensor(values, dtype=torch.int32, device=mode.device)  # noqa: E731
    built = extend_attn.build_unified_kv_indices(
        ints([0, 30, 30, 37]), torch.cat([prefix, prefix[:5]]), ints([0, 4, 5]), ints([4, 1, 9]), new, 3
    )
    case.kwargs.update(zip(("kv_indptr", "kv_indices", "prefix_lens"), built))
    mode.check(case)


# --- signatures -------------------------------------------------------------------------------------------------------

ADDITIONS = {
    "return_lse": False,
    "q_positions": None,
    "plan": None,
    "tile": None,
    "max_len_prefix": None,
    "check": False,
    "batch_invariant": False,
}
SIGNATURES = {
    "extend_attention_fwd": (
        "q_extend k_extend v_extend o_extend k_buffer v_buffer qo_indptr kv_indptr kv_indices custom_mask is_causal "
        "mask_indptr max_len_extend k_scale v_scale",
        {
            "sm_scale": None,
            "logit_cap": 0.0,
            "skip_prefix_custom_mask": True,
            "sliding_window_size": -1,
            "sinks": None,
            "window_kv_offsets": None,
            "xai_temperature_len": -1,
        },
        ADDITIONS,
    ),
    "extend_attention_fwd_unified": (
        "q o k_buffer v_buffer k_scale v_scale qo_indptr kv_indptr kv_indices prefix_lens max_len_extend",
        {
            "custom_mask": None,
            "mask_indptr": None,
            "sm_scale": None,
            "logit_cap": 0.0,
            "is_causal": True,
            "sliding_window_size": -1,
            "sinks": None,
            "window_start_pos": None,
            "xai_temperature_len": -1,
        },
        ADDITIONS,
    ),
    "build_unified_kv_indices": (
        "prefix_kv_indptr prefix_kv_indices extend_start_loc extend_seq_lens extend_kv_indices bs",
        {},
        {},
    ),
    "redundant_attention": (
        "q_extend o_extend k_buffer v_buffer b_req_idx b_start_loc b_seq_len b_seq_len_prefix max_len_in_batch",
        {},
        {},
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    """Names, order and defaults are what an import swap needs; additions are keyword-only."""
    required, defaults, additions = SIGNATURES[name]
    parameters = inspect.signature(getattr(extend_attn, name)).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == required.split() + list(defaults)
    assert {p.name: p.default for p in positional if p.default is not p.empty} == defaults
    keyword_only = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keyword_only == additions
    assert not [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


@pytest.mark.parametrize("name", ["extend_attention_fwd", "extend_attention_fwd_unified"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_public_reference(name, dtype):
    """``extend_attn.reference`` holds the same functions, with the type to compute in; in fp64 they are the oracle."""
    from extend_attn import reference

    case = make_case(unified=name.endswith("unified"), **FEATURES["everything"])
    out, buffer = case.out()
    target = {"o" if case.spec.unified else "o_extend": out}
    lse = getattr(reference, name)(**target, **case.kwargs, return_lse=True, compute_dtype=dtype)
    assert_right(case, out, buffer, lse)
    if dtype is torch.float64:  # then all that is left is one rounding
        used = case.expected.used
        torch.testing.assert_close(out[used].double(), case.expected.out[used], rtol=2.0**-24, atol=1e-12)
