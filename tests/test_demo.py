"""The demo: its pool, the work it counts, that it passes, and that it fails when a kernel is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from extend_attn.cli import demo, scenario

TINY = scenario.Scale(prompt=24, chunk=16, batch=3, draft=2, window=8, shortest_prefix=2, longest_prefix=30)
TINY_FLAGS = ["--device", "cpu", "--prompt", "40", "--chunk", "16", "--batch", "2"]


def story(layer_index: int = 0, scale: scenario.Scale = TINY) -> list:
    layer = scenario.layers(scale)[layer_index]
    return list(scenario.steps(layer, scale, torch.float32, torch.device("cpu"), seed=0))


def test_full_scale_is_the_published_story():
    full = scenario.FULL
    assert (full.prompt, full.batch, full.draft, full.window) == (8192, 32, 4, 1024)
    assert (scenario.HEAD_DIM, scenario.NUM_Q_HEADS, scenario.NUM_KV_HEADS) == (256, 8, 4)
    assert [layer.sliding_window_size for layer in scenario.layers(full)] == [1023, -1]


def test_story_prefills_the_prompt_in_chunks_then_verifies():
    steps = story()
    assert len(steps) == TINY.num_steps() == 3
    assert [(s.prefix_lens, s.extend_lens) for s in steps[:2]] == [([0], [16]), ([16], [8])]
    assert steps[2].prefix_lens[0] == 24 and steps[2].extend_lens == [2, 2, 2]


def test_slots_are_scattered_and_each_token_has_its_own():
    indices = story()[-1].arguments["kv_indices"]
    assert indices.unique().numel() == indices.numel()
    steps = indices[1:] - indices[:-1]
    assert (steps == 1).float().mean() < 0.2, "slots follow each other: not a page size 1 pool"


def test_a_later_chunk_reads_what_the_earlier_stored():
    first, second, _ = story()
    slots = second.arguments["kv_indices"]
    assert torch.equal(second.arguments["k_buffer"][slots], first.arguments["k_extend"])
    assert torch.equal(second.arguments["v_buffer"][slots], first.arguments["v_extend"])


def test_free_slots_are_nan():
    pool = scenario.KvPool(10, torch.float32, torch.Generator().manual_seed(0))
    k, v = scenario._tokens(3, torch.float32, torch.Generator().manual_seed(1))
    slots = pool.store(k, v)
    assert pool.k.isnan().any(dim=(1, 2)).sum() == 7
    assert torch.equal(pool.v[slots], v)


@pytest.mark.parametrize("layer_index", [0, 1])
def test_counted_work(layer_index):
    """FLOPs and bytes against a count of every seen pair and every key that some query sees."""
    for step in story(layer_index):
        window = step.layer.sliding_window_size
        pairs = prefix_keys = 0
        for prefix, extend in zip(step.prefix_lens, step.extend_lens):
            q, k = torch.arange(prefix, prefix + extend)[:, None], torch.arange(prefix + extend)[None, :]
            seen = (k <= q) & ((q <= k + window) if window > 0 else True)
            pairs += int(seen.sum())
            prefix_keys += int(seen.any(dim=0)[:prefix].sum())
        assert step.flops() == pairs * 8 * 4 * 256
        rows = sum(step.extend_lens) * (2 * 8 + 2 * 4) + prefix_keys * 2 * 4
        assert step.bytes() == rows * 256 * 4 + prefix_keys * 8


def test_runs_on_a_cpu_and_says_that_it_is_scaled_down(capsys, tmp_path):
    path = tmp_path / "demo.json"
    assert demo.main([*TINY_FLAGS, "--json", str(path)]) == 0
    printed = capsys.readouterr()
    assert "Scaled down" in printed.out and "fp64" in printed.out
    assert "8 of 8 steps agree" in printed.out
    assert "[8/8]" in printed.err  # progress
    results = json.loads(path.read_text())
    assert len(results) == 8 and all(r["passed"] and r["plan"] and r["source"] for r in results)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_types(dtype, capsys):
    assert demo.main([*TINY_FLAGS, "--dtype", dtype]) == 0


@pytest.mark.parametrize("wrong", ["a value", "nan", "nothing written"])
def test_fails_when_a_result_is_wrong(wrong, monkeypatch, capsys):
    right = demo.extend_attention_fwd

    def broken(o_extend, **arguments):
        if wrong == "nothing written":
            return
        right(o_extend=o_extend, **arguments)
        if arguments["max_len_extend"] == scenario.FULL.draft:
            o_extend[1, 0, 3] = float("nan") if wrong == "nan" else 1.0

    monkeypatch.setattr(demo, "extend_attention_fwd", broken)
    assert demo.main(TINY_FLAGS) == 1
    printed = capsys.readouterr()
    assert "FAILED" in printed.out
    assert "wrong: full, verify" in printed.err


def test_a_small_systematic_error_fails():
    """The bound is tight: 0.5 % too much on every element of a bf16 result does not pass."""
    step = next(scenario.steps(scenario.layers(TINY)[1], TINY, torch.bfloat16, torch.device("cpu"), seed=0))
    out = torch.empty_like(step.arguments["q_extend"])
    demo.extend_attention_fwd(o_extend=out, **step.arguments)
    error, bound = demo.check(step, out)
    assert error <= bound
    error, bound = demo.check(step, out * 1.005)
    assert error > bound


def test_wrong_usage(capsys):
    with pytest.raises(SystemExit) as raised:
        demo.main(["--device", "cpu", "--batch", "0"])
    assert raised.value.code == 2 and "--batch" in capsys.readouterr().err


def test_runs_the_kernels_under_the_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "extend_attn", "demo", *TINY_FLAGS, "--dtype", "float16"],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "interpreter" in done.stdout and "not run" not in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_full_scale_on_a_gpu(dtype, capsys):
    assert demo.main(["--dtype", dtype]) == 0, capsys.readouterr().out
