"""Bad input: an error that names the argument, what it got and what is allowed, before anything is written."""

from __future__ import annotations

import re

import pytest
import torch
from cases import make_case

import extend_attn

I32, I64 = torch.int32, torch.int64
FWD, UNIFIED = "extend_attention_fwd", "extend_attention_fwd_unified"


def _ints(*values, dtype=I32):
    return torch.tensor(values, dtype=dtype)


def _rows(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


def _last_dim_strided(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


# What to change in a good call of 21 tokens (E 17 and 4, P 8 and 5), 4 query and 2 KV heads, head dim 32;
# then the error and what its message must say besides the argument's name.
BAD = {
    # type
    ("q_extend", "float64"): (lambda k: k["q_extend"].double(), TypeError, "float64.*bfloat16.*float16.*float32"),
    ("q_extend", "int"): (lambda k: k["q_extend"].int(), TypeError, "int32"),
    ("q_extend", "not a tensor"): (lambda k: [1.0], TypeError, "list"),
    ("q_extend", "None"): (lambda k: None, TypeError, "None"),
    ("k_extend", "other type"): (lambda k: k["k_extend"].bfloat16(), TypeError, r"bfloat16.*float32.*\.to\("),
    ("v_extend", "other type"): (lambda k: k["v_extend"].half(), TypeError, r"float16.*float32.*\.to\("),
    ("o_extend", "half"): (lambda k: _rows(24, 4, 32, dtype=torch.float16), TypeError, "float16.*float32"),
    ("o_extend", "fp8"): (lambda k: _rows(24, 4, 32).to(torch.float8_e5m2), TypeError, "float8_e5m2"),
    ("k_buffer", "other type"): (lambda k: k["k_buffer"].half(), TypeError, "float16.*float32"),
    ("v_buffer", "other type"): (lambda k: k["v_buffer"].half(), TypeError, "float16.*float32"),
    ("k_buffer", "fnuz"): (lambda k: k["k_buffer"].to(torch.float8_e4m3fnuz), TypeError, "fnuz"),
    ("v_buffer", "not as k_buffer"): (lambda k: k["v_buffer"].to(torch.float8_e5m2), TypeError, "float8_e5m2.*float32"),
    ("qo_indptr", "float"): (lambda k: k["qo_indptr"].float(), TypeError, "float32.*int32.*int64"),
    ("qo_indptr", "int16"): (lambda k: k["qo_indptr"].short(), TypeError, "int16.*int32.*int64"),
    ("kv_indptr", "float"): (lambda k: k["kv_indptr"].float(), TypeError, "float32.*int32.*int64"),
    ("kv_indices", "float"): (lambda k: k["kv_indices"].float(), TypeError, "float32.*int32.*int64"),
    ("kv_indices", "list"): (lambda k: [0, 1, 2], TypeError, "list"),
    ("custom_mask", "float"): (lambda k: torch.ones(1000), TypeError, "float32.*bool.*uint8"),
    ("custom_mask", "int32"): (lambda k: torch.ones(1000, dtype=I32), TypeError, "int32.*bool.*uint8"),
    ("mask_indptr", "int32"): (lambda k: k["mask_indptr"].int(), TypeError, "int32.*int64"),
    ("sinks", "int"): (lambda k: _ints(1, 2, 3, 4), TypeError, "int32.*float32"),
    ("sinks", "float64"): (lambda k: torch.zeros(4, dtype=torch.float64), TypeError, "float64.*float32"),
    ("window_kv_offsets", "float"): (lambda k: torch.zeros(2), TypeError, "float32.*int32"),
    ("q_positions", "int64"): (lambda k: torch.zeros(24, dtype=I64), TypeError, "int64.*int32"),
    ("max_len_extend", "float"): (lambda k: 17.0, TypeError, "float"),
    ("max_len_extend", "tensor"): (lambda k: torch.tensor(17), TypeError, "Tensor"),
    ("max_len_extend", "None"): (lambda k: None, TypeError, "None"),
    ("sliding_window_size", "float"): (lambda k: 3.5, TypeError, "float"),
    ("xai_temperature_len", "float"): (lambda k: 2.5, TypeError, "float"),
    ("k_scale", "tensor"): (lambda k: torch.tensor(1.0), TypeError, "Tensor"),
    ("v_scale", "str"): (lambda k: "1.0", TypeError, "str"),
    ("sm_scale", "tensor"): (lambda k: torch.tensor(1.0), TypeError, "Tensor"),
    ("logit_cap", "str"): (lambda k: "30", TypeError, "str"),
    # rank and shape
    ("q_extend", "rank 2"): (lambda k: k["q_extend"].flatten(1), ValueError, r"\(24, 128\)"),
    ("k_extend", "rank 4"): (lambda k: k["k_extend"][None], ValueError, r"\(1, 24, 2, 32\)"),
    ("v_extend", "rank 2"): (lambda k: k["v_extend"][:, 0], ValueError, r"\(24, 32\)"),
    ("o_extend", "rank 2"): (lambda k: _rows(24, 128), ValueError, r"\(24, 128\)"),
    ("k_buffer", "rank 2"): (lambda k: k["k_buffer"][:, 0], ValueError, ", 32"),
    ("k_extend", "heads"): (lambda k: _rows(24, 3, 32), ValueError, "3.*4"),
    ("k_extend", "no heads"): (lambda k: _rows(24, 0, 32), ValueError, "0.*4"),
    ("k_extend", "head dim"): (lambda k: _rows(24, 2, 16), ValueError, "16.*32"),
    ("v_extend", "heads"): (lambda k: _rows(24, 1, 32), ValueError, "1.*2"),
    ("k_buffer", "heads"): (lambda k: k["k_buffer"][:, :1], ValueError, "1.*2"),
    ("k_buffer", "head dim"): (lambda k: k["k_buffer"].repeat(1, 1, 2), ValueError, "64.*32"),
    ("v_buffer", "head dim"): (lambda k: k["v_buffer"][:, :, :16], ValueError, "16.*32"),
    ("v_buffer", "heads"): (lambda k: k["v_buffer"][:, :1], ValueError, "1.*2"),
    ("o_extend", "heads"): (lambda k: _rows(24, 2, 32), ValueError, "2.*4"),
    ("o_extend", "head dim"): (lambda k: _rows(24, 4, 16), ValueError, "16.*32"),
    ("qo_indptr", "rank 2"): (lambda k: k["qo_indptr"][None], ValueError, r"\(1, 3\)"),
    ("qo_indptr", "empty"): (lambda k: k["qo_indptr"][:0], ValueError, "0"),
    ("qo_indptr", "scalar"): (lambda k: torch.tensor(3), ValueError, r"\(\)"),
    ("kv_indptr", "short"): (lambda k: k["kv_indptr"][:2], ValueError, "2.*3"),
    ("kv_indices", "rank 2"): (lambda k: k["kv_indices"][None], ValueError, "1"),
    ("mask_indptr", "short"): (lambda k: k["mask_indptr"][:2], ValueError, "2.*3"),
    ("mask_indptr", "None"): (lambda k: None, ValueError, "custom_mask"),
    ("custom_mask", "rank 2"): (lambda k: k["custom_mask"][None], ValueError, "1"),
    ("sinks", "short"): (lambda k: torch.zeros(3), ValueError, "3.*4"),
    ("sinks", "rank 2"): (lambda k: torch.zeros(4, 1), ValueError, r"\(4, 1\)"),
    ("window_kv_offsets", "short"): (lambda k: _ints(1), ValueError, "1.*2"),
    ("q_positions", "rank 2"): (lambda k: torch.zeros(24, 1, dtype=I32), ValueError, r"\(24, 1\)"),
    # strides
    ("q_extend", "strided"): (lambda k: _last_dim_strided(k["q_extend"]), ValueError, "contiguous"),
    ("k_extend", "strided"): (lambda k: _last_dim_strided(k["k_extend"]), ValueError, "contiguous"),
    ("v_extend", "strided"): (lambda k: _last_dim_strided(k["v_extend"]), ValueError, "contiguous"),
    ("o_extend", "strided"): (lambda k: _last_dim_strided(_rows(24, 4, 32)), ValueError, "contiguous"),
    ("k_buffer", "strided"): (lambda k: _last_dim_strided(k["k_buffer"]), ValueError, "contiguous"),
    ("v_buffer", "strided"): (lambda k: _last_dim_strided(k["v_buffer"]), ValueError, "contiguous"),
    ("kv_indices", "strided"): (lambda k: k["kv_indices"].repeat_interleave(2)[::2], ValueError, "contiguous"),
    ("custom_mask", "strided"): (lambda k: k["custom_mask"].repeat_interleave(2)[::2], ValueError, "contiguous"),
    # device
    ("k_extend", "device"): (lambda k: k["k_extend"].to("meta"), ValueError, "meta"),
    ("v_extend", "device"): (lambda k: k["v_extend"].to("meta"), ValueError, "meta"),
    ("o_extend", "device"): (lambda k: _rows(24, 4, 32).to("meta"), ValueError, "meta"),
    ("k_buffer", "device"): (lambda k: k["k_buffer"].to("meta"), ValueError, "meta"),
    ("kv_indices", "device"): (lambda k: k["kv_indices"].to("meta"), ValueError, "meta.*cpu"),
    ("qo_indptr", "device"): (lambda k: k["qo_indptr"].to("meta"), ValueError, "meta.*cpu"),
    ("custom_mask", "device"): (lambda k: k["custom_mask"].to("meta"), ValueError, "meta.*cpu"),
    ("sinks", "device"): (lambda k: torch.zeros(4, device="meta"), ValueError, "meta.*cpu"),
    # values
    ("max_len_extend", "negative"): (lambda k: -1, ValueError, "-1"),
    ("logit_cap", "negative"): (lambda k: -1.0, ValueError, "-1"),
    ("logit_cap", "nan"): (lambda k: float("nan"), ValueError, "nan"),
    ("sm_scale", "inf"): (lambda k: float("inf"), ValueError, "inf"),
    ("xai_temperature_len", "0"): (lambda k: 0, ValueError, "0"),
    ("xai_temperature_len", "1"): (lambda k: 1, ValueError, "1"),
    ("max_len_prefix", "negative"): (lambda k: -3, ValueError, "-3"),
    ("batch_invariant", "not yet"): (lambda k: True, NotImplementedError, "False"),
    # plans
    ("plan", "unknown name"): (lambda k: "fastest", ValueError, "fastest.*sglang"),
    ("plan", "unknown family"): (lambda k: {"family": "round"}, ValueError, "round"),
    ("plan", "unknown field"): (lambda k: {"block": 64}, ValueError, "block"),
    ("plan", "int"): (lambda k: 64, TypeError, "64"),
    ("plan", "too many stages"): (
        lambda k: {"family": "tiled", "tile": {"block_m": 512, "block_n": 512, "num_stages": 8}},
        ValueError,
        "512",
    ),
    ("plan", "no such table"): (lambda k: "table:/no/such/file.json", (ValueError, OSError), "file.json"),
    ("tile", "odd size"): (lambda k: {"block_m": 17, "block_n": 16}, ValueError, "17"),
}
# What is wrong inside a plan is named by its field.
IN_A_PLAN = ("family", "block_m", "table")
# Names of the unified function's arguments where they differ; None: it has no such argument.
IN_UNIFIED = {
    "q_extend": "q",
    "o_extend": "o",
    "k_extend": None,
    "v_extend": None,
    "window_kv_offsets": "window_start_pos",
}
# There these are what defines the shape, or need tensors that the unified call does not have.
ONLY_TWO_STAGE = {("k_buffer", "heads"), ("v_buffer", "head dim"), ("o_extend", "head dim")}


def _call(name, changed):
    """A good call, then one with some arguments changed: nothing remembered from the first may excuse the second."""
    unified = name == UNIFIED
    case = make_case(
        lengths=[(17, 8), (4, 5)], unified=unified, mask="random", mask_prefix=True, layout="plain", window=9
    )
    case.kwargs["window_start_pos" if unified else "window_kv_offsets"] = _ints(0, 0)
    out, buffer = case.out()
    kwargs = {("o" if unified else "o_extend"): out, **case.kwargs}
    source = {**kwargs, "q_extend": case.kwargs["q"]} if unified else kwargs
    kwargs.update({argument: make(source) for argument, make in changed.items()})
    good = case.out()[0]
    getattr(extend_attn, name)(**case.kwargs, **{"o" if unified else "o_extend": good})
    assert not torch.isnan(good[:21]).any()
    try:
        getattr(extend_attn, name)(**kwargs)
    finally:
        assert torch.isnan(buffer).all(), "something was written"


def _bad_cases():
    for (argument, what), (make, error, says) in BAD.items():
        yield pytest.param(FWD, argument, make, error, says, id=f"fwd-{argument}-{what}".replace(" ", "_"))
        renamed = IN_UNIFIED.get(argument, argument)
        if renamed is not None and (argument, what) not in ONLY_TWO_STAGE:
            yield pytest.param(UNIFIED, renamed, make, error, says, id=f"unified-{argument}-{what}".replace(" ", "_"))


@pytest.mark.parametrize("name, argument, make, error, says", list(_bad_cases()))
def test_bad_argument(name, argument, make, error, says):
    with pytest.raises(error) as caught:
        _call(name, {argument: make})
    message = str(caught.value)
    assert message.startswith((argument, *IN_A_PLAN) if argument in ("plan", "tile") else argument), message
    assert re.search(says, message, re.DOTALL), message
    assert len(message) > len(argument) + 15, "what is allowed?"


@pytest.mark.parametrize(
    "argument, make, error",
    [
        ("prefix_lens", lambda k: k["prefix_lens"][:1], ValueError),
        ("prefix_lens", lambda k: k["prefix_lens"].float(), TypeError),
        ("prefix_lens", lambda k: None, TypeError),
        ("k_buffer", lambda k: k["k_buffer"][:, :1].repeat(1, 3, 1), ValueError),
        ("k_buffer", lambda k: k["k_buffer"][:, :, :16], ValueError),
        ("v_buffer", lambda k: _rows(40, 1, 32), ValueError),
        ("v_buffer", lambda k: k["v_buffer"][:5], ValueError),
        ("o", lambda k: _rows(24, 4, 16), ValueError),
    ],
)
def test_bad_unified_argument(argument, make, error):
    with pytest.raises(error) as caught:
        _call(UNIFIED, {argument: make})
    assert str(caught.value).startswith(argument)


@pytest.mark.parametrize("dim", [8, 15, 577, 1024])
@pytest.mark.parametrize("which", ["qk", "v"])
def test_head_dims_outside_16_to_576(dim, which):
    """Refused by name, never a wrong answer."""
    case = make_case(
        lengths=[(3, 4)], dim=dim if which == "qk" else 32, dim_v=dim if which == "v" else 32, heads=(1, 1)
    )
    out, buffer = case.out()
    with pytest.raises((ValueError, NotImplementedError), match=r"head_dim|q_extend|v_extend|Dq|Dv"):
        extend_attn.extend_attention_fwd(o_extend=out, **case.kwargs)
    assert torch.isnan(buffer).all()


def test_unknown_keyword():
    with pytest.raises(TypeError, match="window_size"):
        _call(FWD, {"window_size": lambda k: 3})


@pytest.mark.gpu
@pytest.mark.parametrize("argument", ["k_extend", "v_extend", "k_buffer", "kv_indices", "qo_indptr", "o_extend"])
def test_a_tensor_left_on_the_host(argument):
    case = make_case(lengths=[(3, 4)], device="cuda", dtype=torch.bfloat16)
    out, buffer = case.out()
    kwargs = {**case.kwargs, "o_extend": out}
    kwargs[argument] = kwargs[argument].cpu()
    with pytest.raises(ValueError, match=f"^{argument}.*cpu.*cuda"):
        extend_attn.extend_attention_fwd(**kwargs)
    assert torch.isnan(buffer).all()
