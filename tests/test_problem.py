"""Problem: what it refuses and by which name, its cache keys, its JSON, and the problems of a model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import extend_attn
from extend_attn.problem import FP8_TYPES, Problem, bucket, size_class

BASE = Problem("bfloat16", 256, 256, 8, 4, batch_size=32, num_tokens=128, max_len_extend=4, num_kv_indices=256000)


@pytest.mark.parametrize(
    "name, value",
    (
        ("dtype", "int8"),
        ("dtype", "torch.bfloat16"),
        ("dtype", "float8_e4m3fn"),
        ("kv_dtype", "float16"),
        ("kv_dtype", "int8"),
        ("out_dtype", "float16"),
        ("index_dtype", "int16"),
        ("head_dim_qk", 15),
        ("head_dim_qk", 577),
        ("head_dim_v", 0),
        ("head_dim_v", 1024),
        ("num_q_heads", 0),
        ("num_q_heads", 9),
        ("num_kv_heads", 0),
        ("num_kv_heads", -4),
        ("batch_size", -1),
        ("num_tokens", -1),
        ("max_len_extend", -1),
        ("num_kv_indices", -1),
        ("max_len_prefix", -1),
        ("xai_temperature_len", 0),
        ("xai_temperature_len", 1),
        ("logit_cap", -1.0),
        ("logit_cap", math.nan),
        ("logit_cap", math.inf),
        ("alignment", 0),
        ("alignment", 3),
        ("alignment", 32),
        ("mask_prefix", True),
    ),
)
def test_a_bad_value_is_refused_by_its_name(name, value):
    with pytest.raises(ValueError, match=f"{name}"):
        replace(BASE, **{name: value})


@pytest.mark.parametrize(
    "name, value",
    (
        ("batch_size", 4.0),
        ("batch_size", True),
        ("num_tokens", "128"),
        ("head_dim_qk", None),
        ("max_len_prefix", 1.5),
        ("sliding_window", 1023.0),
        ("logit_cap", "30"),
        ("is_causal", 1),
        ("custom_mask", None),
    ),
)
def test_a_wrong_type_is_refused_by_its_name(name, value):
    with pytest.raises(TypeError, match=f"^{name}: "):
        replace(BASE, **{name: value})


@pytest.mark.parametrize("flag", ("v_aliases_k_pool", "v_aliases_k_new"))
def test_a_value_inside_its_key_is_not_longer_than_it(flag):
    with pytest.raises(ValueError, match=f"^{flag}: .*head_dim_v 256 > head_dim_qk 192"):
        replace(BASE, head_dim_qk=192, **{flag: True})
    assert getattr(replace(BASE, head_dim_qk=576, head_dim_v=512, **{flag: True}), flag)


def test_a_unified_call_has_no_new_keys_to_alias():
    with pytest.raises(ValueError, match="^v_aliases_k_new: "):
        replace(BASE, unified=True, v_aliases_k_new=True)


def test_what_is_normalised():
    p = replace(BASE, sliding_window=0, xai_temperature_len=-7)
    assert (p.kv_dtype, p.out_dtype, p.sliding_window, p.xai_temperature_len) == ("bfloat16", "bfloat16", -1, -1)
    assert replace(BASE, sliding_window=-5) == BASE
    assert replace(BASE, unified=True, custom_mask=True).mask_prefix
    assert not replace(BASE, custom_mask=True).mask_prefix


def test_legal_extremes():
    replace(BASE, batch_size=0, num_tokens=0, max_len_extend=0, num_kv_indices=0)
    replace(BASE, head_dim_qk=16, head_dim_v=576, num_q_heads=7, num_kv_heads=1)
    replace(BASE, max_len_extend=10**6)  # an upper bound may exceed what there is
    replace(BASE, xai_temperature_len=2, logit_cap=0)
    for dtype in FP8_TYPES:
        replace(BASE, kv_dtype=dtype, out_dtype="float32")


def test_it_is_frozen():
    with pytest.raises(FrozenInstanceError):
        BASE.batch_size = 1  # type: ignore[misc]


def test_derived_facts():
    assert (BASE.group, BASE.rows, BASE.packed_rows) == (2, 8, 16)
    assert replace(BASE, num_q_heads=28, max_len_extend=5).packed_rows == 64  # 7 x 5 = 35 rows
    assert BASE.prefix_bound is None and BASE.prefix_hint == 8000
    windowed = replace(BASE, sliding_window=1023)
    assert windowed.prefix_bound == windowed.prefix_hint == 1023
    assert replace(windowed, max_len_prefix=64).prefix_bound == 64
    assert replace(BASE, num_kv_indices=10**9, max_len_prefix=500).prefix_hint == 500
    assert BASE.has_prefix and not replace(BASE, num_kv_indices=0).has_prefix
    assert not replace(BASE, max_len_prefix=0).has_prefix
    assert replace(BASE, max_len_prefix=0, unified=True).has_prefix  # its new keys lie in the pool too
    assert replace(BASE, batch_size=0).prefix_hint == 256000


@pytest.mark.parametrize("n, expected", ((0, 0), (1, 1), (2, 2), (3, 4), (4, 4), (1000, 1024), (1025, 2048)))
def test_buckets(n, expected):
    assert bucket(n) == expected


@pytest.mark.parametrize(
    "n, expected", ((0, 0), (1, 1), (7, 7), (8, 8), (9, 9), (15, 15), (16, 16), (17, 20), (33, 40), (1000, 1024))
)
def test_size_classes(n, expected):
    assert size_class(n) == expected


@given(st.integers(1, 1 << 40))
def test_a_size_class_is_little_more_and_holds_powers_of_two(n):
    assert n <= size_class(n) <= 1.25 * n and size_class(size_class(n)) == size_class(n) <= bucket(n)
    assert size_class(bucket(n)) == bucket(n)


# Every field of Problem and a value that differs from BASE's in a way that matters.
OTHER = {
    "dtype": "float16",
    "head_dim_qk": 128,
    "head_dim_v": 128,
    "num_q_heads": 16,
    "num_kv_heads": 2,
    "batch_size": 33,
    "num_tokens": 129,
    "max_len_extend": 5,
    "num_kv_indices": 300000,
    "kv_dtype": "float8_e4m3fn",
    "out_dtype": "float32",
    "index_dtype": "int32",
    "max_len_prefix": 8000,
    "is_causal": False,
    "custom_mask": True,
    "mask_prefix": True,
    "sliding_window": 1023,
    "window_offsets": True,
    "q_positions": True,
    "sinks": True,
    "logit_cap": 30.0,
    "xai_temperature_len": 1024,
    "return_lse": True,
    "unified": True,
    "v_aliases_k_pool": True,
    "v_aliases_k_new": True,
    "batch_invariant": True,
    "alignment": 8,
}


def changed(name):
    """BASE with one field changed, and whatever that field needs beside it (the same in both problems)."""
    beside = {"custom_mask": True} if name == "mask_prefix" else {}
    one = replace(BASE, **beside)
    other = {"kv_dtype": "", "out_dtype": ""} if name == "dtype" else {}  # these follow the type
    return one, replace(one, **{**other, name: OTHER[name]})


def test_the_list_above_names_every_field():
    assert list(OTHER) == [f.name for f in fields(Problem)]


@pytest.mark.parametrize("name", OTHER)
def test_every_field_is_in_the_key(name):
    one, other = changed(name)
    assert one.key() != other.key()
    assert hash(one.key()) != hash(other.key())


@pytest.mark.parametrize(
    "changes",
    (
        {"batch_size": 29, "num_tokens": 113, "num_kv_indices": 229377},
        {"num_kv_indices": 262144},
    ),
)
def test_the_key_survives_from_step_to_step(changes):
    assert replace(BASE, **changes).key() == BASE.key()


@pytest.mark.parametrize("changes", ({"batch_size": 28}, {"max_len_extend": 3}, {"num_kv_indices": 229376}))
def test_a_size_of_another_class_changes_the_key(changes):
    assert replace(BASE, **changes).key() != BASE.key()


def test_values_that_kernels_take_at_run_time_do_not_change_the_key():
    one = replace(BASE, logit_cap=30.0, xai_temperature_len=1024, sliding_window=1023, max_len_prefix=900)
    other = replace(BASE, logit_cap=50.0, xai_temperature_len=2048, sliding_window=1000, max_len_prefix=1000)
    assert one.key() == other.key()


def test_a_prefix_that_comes_or_goes_changes_the_key():
    keys = {replace(BASE, num_kv_indices=n).key() for n in (0, 1)}
    bounds = {replace(BASE, max_len_prefix=n).key() for n in (None, 0, 1)}
    assert (len(keys), len(bounds)) == (2, 3)


sizes = st.integers(0, 1 << 40)


@st.composite
def problems(draw):
    dtype = draw(st.sampled_from(("bfloat16", "float16", "float32")))
    dims = draw(st.tuples(st.integers(16, 576), st.integers(16, 576)))
    kv_heads = draw(st.integers(1, 16))
    names = ("is_causal", "custom_mask", "window_offsets", "q_positions", "sinks")
    flags = {name: draw(st.booleans()) for name in names}
    unified = draw(st.booleans())
    fits = dims[1] <= dims[0]
    return Problem(
        dtype,
        *dims,
        num_q_heads=kv_heads * draw(st.integers(1, 16)),
        num_kv_heads=kv_heads,
        batch_size=draw(sizes),
        num_tokens=draw(sizes),
        max_len_extend=draw(sizes),
        num_kv_indices=draw(sizes),
        kv_dtype=draw(st.sampled_from((dtype, *FP8_TYPES))),
        out_dtype=draw(st.sampled_from((dtype, "float32"))),
        index_dtype=draw(st.sampled_from(("int32", "int64"))),
        max_len_prefix=draw(st.none() | sizes),
        sliding_window=draw(st.integers(-2, 1 << 20)),
        mask_prefix=flags["custom_mask"] and draw(st.booleans()),
        logit_cap=draw(st.floats(0, 1e6)),
        xai_temperature_len=draw(st.sampled_from((-1, 2, 1024))),
        return_lse=draw(st.booleans()),
        unified=unified,
        v_aliases_k_pool=fits and draw(st.booleans()),
        v_aliases_k_new=fits and not unified and draw(st.booleans()),
        alignment=draw(st.sampled_from((1, 2, 4, 8, 16))),
        **flags,
    )


@settings(deadline=None)
@given(problems())
def test_json_round_trip(problem):
    text = json.dumps(problem.to_json())
    assert Problem.from_json(text) == problem
    assert Problem.from_json(json.loads(text)).key() == problem.key()


@settings(deadline=None)
@given(problems())
def test_a_bucketed_problem_keeps_its_keys(problem):
    sized = problem.bucketed()
    assert sized.key() == problem.key()
    assert sized.tuning_key() == problem.tuning_key()
    assert sized.bucketed() == sized


def test_json_with_only_what_is_needed():
    needed = {f.name: getattr(BASE, f.name) for f in fields(Problem)[:9]}
    assert Problem.from_json(needed) == BASE
    for name in needed:
        with pytest.raises(ValueError, match=f"missing field {name}"):
            Problem.from_json({k: v for k, v in needed.items() if k != name})
    with pytest.raises(ValueError, match="unknown field head_size"):
        Problem.from_json({**needed, "head_size": 256})
    with pytest.raises(ValueError, match="expected a JSON object"):
        Problem.from_json("[1]")


def test_the_problems_of_a_model():
    problems = Problem.for_model(
        head_dim=256,
        num_q_heads=8,
        num_kv_heads=4,
        batch_sizes=(1, 31, 32),
        max_len_extend=(4, 8192),
        sliding_window=(1023, -1),
        sinks=True,
    )
    assert len(problems) == len({p.key() for p in problems}) == 2 * 2 * 2 * 2  # 31 and 32 sequences share a key
    assert {p.max_len_extend for p in problems} == {4, 8192}
    assert {p.sliding_window for p in problems} == {1023, -1}
    assert {p.has_prefix for p in problems} == {False, True}
    assert all(p.sinks and p.head_dim_v == 256 and p.num_tokens == p.batch_size * p.max_len_extend for p in problems)


def test_the_problems_of_an_mla_model_and_of_unified_calls():
    mla = Problem.for_model(
        head_dim=576,
        head_dim_v=512,
        num_q_heads=16,
        num_kv_heads=1,
        batch_sizes=(1,),
        max_len_extend=1,
        prefix=(True,),
        v_aliases_k_pool=True,
    )
    assert [(p.head_dim_v, p.max_len_extend, p.has_prefix) for p in mla] == [(512, 1, True)]
    unified = Problem.for_model(
        head_dim=64, num_q_heads=8, num_kv_heads=8, batch_sizes=(1,), max_len_extend=(1, 16), unified=True
    )
    assert [p.has_prefix for p in unified] == [True, True]


def test_importing_problem_and_plan_imports_neither_torch_nor_triton():
    code = (
        "import sys, extend_attn.problem, extend_attn.plan\n"
        "from extend_attn.plan import DeviceSpec, explain, select\n"
        "p = extend_attn.problem.Problem('bfloat16', 256, 256, 8, 4, 32, 128, 4, 256000)\n"
        "str(explain(p, DeviceSpec.preset('h200')))\n"
        "print([m for m in ('torch', 'triton', 'numpy') if m in sys.modules])\n"
    )
    sources = os.path.dirname(os.path.dirname(extend_attn.__file__))
    environment = {**os.environ, "PYTHONPATH": sources}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
