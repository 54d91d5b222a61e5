"""Random problems (hypothesis), and what must hold between calls whatever the problem.

HYPOTHESIS_PROFILE=fuzz in the environment looks further: new examples each time and many more of them, shrunk.
"""

from __future__ import annotations

import os

import bars
import pytest
import torch
from cases import make_case, rebuild
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from modes import REFERENCE, modes

FUZZ = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"
EXAMPLES = {"reference": 80, "interpreted": 15, "gpu": 12}

lengths = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 40)), min_size=0, max_size=4)
split_lengths = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 400)), min_size=1, max_size=2)
long_lengths = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 1500)), min_size=0, max_size=9)


@st.composite
def specs(draw, sizes):
    """A Spec's fields. Each rule is off half of the time or more, so that pairs of rules are what is met most."""
    alias = draw(st.booleans()) and draw(st.booleans())
    dim = draw(st.sampled_from([16, 24, 32]))
    maybe = lambda strategy, off: draw(st.one_of(st.just(off), strategy))  # noqa: E731
    return {
        "lengths": draw(sizes),
        "heads": draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 2), (6, 2)])),
        "dim": dim,
        "dim_v": draw(st.sampled_from([16, dim])) if alias else draw(st.sampled_from([16, 24, 32])),
        "alias": alias,
        "unified": draw(st.booleans()),
        "kv_dtype": maybe(st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]), None),
        "index_dtype": draw(st.sampled_from([torch.int32, torch.int64])),
        "indptr_dtype": draw(st.sampled_from([torch.int32, torch.int64])),
        "layout": draw(st.sampled_from(["plain", "qkv", "odd"])),
        "lead": draw(st.integers(0, 2)),
        "beyond": draw(st.integers(0, 5)),
        "causal": draw(st.booleans()),
        "mask": maybe(st.sampled_from(["tree", "random", "causal", "future", "nothing"]), None),
        "mask_dtype": draw(st.sampled_from([torch.bool, torch.uint8])),
        "mask_prefix": draw(st.booleans()),
        "window": maybe(st.integers(1, 45), -1),
        "cut": maybe(st.lists(st.integers(0, 60), min_size=9, max_size=9), None),
        "tree_positions": draw(st.booleans()),
        "sinks": maybe(st.just(torch.float32), None),
        "logit_cap": maybe(st.floats(0.5, 50.0), 0.0),
        "temperature_len": maybe(st.integers(2, 60), -1),
        "sm_scale": maybe(st.floats(-0.5, 0.5), None),
        "k_scale": maybe(st.floats(0.25, 2.0), 1.0),
        "v_scale": maybe(st.sampled_from([0.0, 0.3, 2.0, -1.5]), None),
        "seed": draw(st.integers(0, 5)),
    }


def _settings(kind):
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    count = EXAMPLES[kind] * (20 if FUZZ else 1)
    phases = [Phase.explicit, Phase.generate]
    if FUZZ or kind == "reference":
        phases.append(Phase.shrink)  # takes minutes where an example takes seconds
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=not FUZZ,
        database=None,
        suppress_health_check=quiet,
        phases=phases,
    )


@_settings("reference")
@given(spec=specs(lengths))
def test_reference(spec):
    REFERENCE.check(make_case(**spec))


tiles = st.fixed_dictionaries(
    {"block_m": st.sampled_from([16, 32]), "block_n": st.sampled_from([16, 32, 64]), "num_stages": st.just(1)}
)
plans = st.one_of(
    st.fixed_dictionaries({"family": st.just("tiled"), "pack_gqa": st.booleans(), "tile": tiles}),
    st.fixed_dictionaries({"family": st.just("packed"), "split_kv": st.integers(1, 5), "tile": tiles}),
)


@pytest.mark.parametrize("mode", modes("tiled", "packed", reference=False, gpu=False), indirect=True)
@_settings("interpreted")
@given(data=st.data())
def test_kernels(mode, data):
    plan = data.draw(plans.filter(lambda p: p["family"] == mode.plan["family"]))
    sizes = split_lengths if plan.get("split_kv", 1) > 1 else lengths
    mode.check(mode.case(**data.draw(specs(sizes))), plan={**mode.plan, **plan})


@pytest.mark.parametrize("mode", modes(reference=False, interpreted=False), indirect=True)
@_settings("gpu")
@given(spec=specs(long_lengths))
def test_kernels_on_the_gpu(mode, spec):
    mode.check(mode.case(**{**spec, "dim": 64, "dim_v": 64, "heads": (6, 2), "layout": "qkv"}))


@pytest.mark.parametrize("mode", modes("tiled", "packed_split3"), indirect=True)
def test_order_of_the_batch_does_not_matter(mode):
    """Sequences swapped, every array rebuilt: the rows of each stay within the bar, wherever they lie."""
    batch = [(3, 290), (1, 0), (0, 5), (9, 140)]
    case = mode.case(lengths=batch, window=200, sinks=torch.float32)
    mode.check(case)
    mode.check(rebuild(case, lengths=batch[::-1]))


@pytest.mark.parametrize(
    "mode", modes("tiled", "packed") + modes("packed_split3", reference=False, interpreted=False), indirect=True
)
@pytest.mark.parametrize("window", [-1, 25])
def test_chunks_equal_the_whole(mode, window):
    """A prompt prefilled in chunks, each with its predecessors as the prefix, is the prompt prefilled at once."""
    total, chunk = (700, 130) if mode.gpu else (60, 17)
    whole = mode.case(lengths=[(total, 0)], window=window, unified=True, layout="plain", beyond=0, temperature_len=8)
    expected = whole.expected
    slots = whole.kwargs["kv_indices"]
    for start in range(0, total, chunk):
        new = min(chunk, total - start)
        part = whole.with_(
            q=whole.kwargs["q"][start : start + new],
            qo_indptr=torch.tensor([0, new], dtype=torch.int32, device=mode.device),
            kv_indptr=torch.tensor([0, start + new], dtype=torch.int32, device=mode.device),
            kv_indices=slots[: start + new],
            prefix_lens=torch.tensor([start], dtype=torch.int32, device=mode.device),
        )
        torch.testing.assert_close(part.expected.out, expected.out[start : start + new], atol=1e-12, rtol=0)
        mode.check(part)


@pytest.mark.parametrize("mode", modes("tiled_gqa", "packed"), indirect=True)
def test_values_enter_linearly(mode):
    """Doubling every value doubles the output exactly (a power of two), and leaves the LSE's bits alone."""
    case = mode.case(lengths=[(9, 30), (3, 0)], sinks=torch.float32, logit_cap=4.0)
    out, _, lse = mode.call(case, return_lse=True)
    case.kwargs["v_extend"] = case.kwargs["v_extend"] * 2
    case.kwargs["v_buffer"] = case.kwargs["v_buffer"] * 2
    twice, _, same = mode.call(case, return_lse=True)
    used = case.expected.used
    assert torch.equal(twice[used], out[used] * 2) and torch.equal(same, lse)


def test_the_bars_can_fail():
    """A bar that nothing fails is no bar: one key left out of sixty, or one row swapped, must show."""
    case = make_case(lengths=[(4, 56)])
    right = case.expected.out.float()
    bars.assert_accurate(right, case)
    short = case.with_(kv_indptr=torch.tensor([0, 55], dtype=torch.int32))
    with pytest.raises(AssertionError):
        bars.assert_accurate(short.expected.out.float(), case)
    swapped = right.clone()
    swapped[0, [0, 1]] = swapped[0, [1, 0]]
    with pytest.raises(AssertionError):
        bars.assert_accurate(swapped, case)
    with pytest.raises(AssertionError):
        bars.assert_lse(short.expected.lse.float(), case)
