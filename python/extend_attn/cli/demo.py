"""``python -m extend_attn demo``: the library's main job on real-sized input, each step checked."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import List, Optional, Tuple

import torch

from extend_attn import reference
from extend_attn.attention import extend_attention_fwd, prepare
from extend_attn.cli import scenario
from extend_attn.cli.render import format_table, progress


@dataclass(frozen=True)
class Outcome:
    """What one step showed. ``error`` and ``bound`` are relative to the Frobenius norm of the reference's output."""

    step: str
    layer: str
    shape: str
    plan: str
    source: str
    seconds: float
    tflops: float
    gbps: float
    is_prefill: bool
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False for NaN

    def row(self) -> Tuple[str, ...]:
        flops = f"{self.tflops:.4g} TFLOP/s" if self.tflops >= 0.1 else f"{self.tflops * 1e3:.3g} GFLOP/s"
        rate = flops if self.is_prefill else f"{self.gbps:.4g} GB/s"
        verdict = "ok" if self.passed else "FAILED"
        took = f"{self.seconds * 1e6:.4g} us" if self.seconds < 0.01 else f"{self.seconds * 1e3:.4g} ms"
        error = f"{self.error:.1e} <= {self.bound:.1e}"
        return (self.layer, self.step, self.shape, self.plan, self.source, took, rate, error, verdict)


HEADERS = ("layer", "step", "new tokens", "tile", "where from", "time", "rate", "error <= bound", "check")


def run_step(step: scenario.Step, plan: Optional[str]) -> Outcome:
    """Run, check and time one step."""
    q = step.arguments["q_extend"]
    assert isinstance(q, torch.Tensor)
    out = torch.full_like(q, float("nan"))
    chosen = prepare(o_extend=out, plan=plan, **step.arguments)[2]

    def call() -> None:
        extend_attention_fwd(o_extend=out, plan=plan, **step.arguments)

    begin = time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    if q.device.type == "cuda":
        seconds = _gpu_seconds(call)
    error, bound = check(step, out)
    on_kernels = q.device.type == "cuda" or interpreted()
    return Outcome(
        step=step.name,
        layer=step.layer.name,
        shape=step.shape(),
        plan=str(chosen),
        source=chosen.source if on_kernels else f"{chosen.source} (not run)",
        seconds=seconds,
        tflops=step.flops() / seconds / 1e12,
        gbps=step.bytes() / seconds / 1e9,
        is_prefill=step.is_prefill,
        error=error,
        bound=bound,
    )


def check(step: scenario.Step, out: torch.Tensor) -> Tuple[float, float]:
    """Relative Frobenius error of ``out`` against the reference in fp64, and what it may be.

    The bound is twice the error of the reference computed in fp32 and rounded to the type of ``out``, plus one unit in
    the last place of the largest element.
    """
    exact = _reference(step, out, torch.float64)
    rounded = _reference(step, out, torch.float32).to(out.dtype).double()
    ulp = torch.finfo(out.dtype).eps * 2.0 ** math.floor(math.log2(float(exact.abs().max())))
    norm = float(exact.norm())
    error, yardstick = float((out.double() - exact).norm()), float((rounded - exact).norm())
    return error / norm, (2 * yardstick + ulp) / norm


def _reference(step: scenario.Step, out: torch.Tensor, compute_dtype: torch.dtype) -> torch.Tensor:
    result = torch.empty_like(out, dtype=torch.float32)
    reference.extend_attention_fwd(o_extend=result, compute_dtype=compute_dtype, **step.arguments)
    return result.double()


def interpreted() -> bool:
    """Whether CPU tensors run on the kernels in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _gpu_seconds(call) -> float:
    """Median time of the call's kernels, in seconds: replayed from a CUDA graph, as an engine does it."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(call, rep=20, return_mode="median") / 1e3


def _device(name: Optional[str]) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m extend_attn demo",
        description="An 8k prompt prefilled in chunks and 32 sequences verifying 4 draft tokens, over a KV pool of "
        "page size 1 with slots in random order, at Gemma-4 shapes. Every step is checked; exits with 1 if one fails.",
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu; by default the GPU if there is one")
    parser.add_argument("--scale", choices=("auto", "full", "small"), default="auto", help="auto: full on a GPU")
    parser.add_argument("--prompt", type=int, help="tokens of the prompt")
    parser.add_argument("--chunk", type=int, help="tokens of a prefill chunk")
    parser.add_argument("--batch", type=int, help="sequences that verify")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--plan", help="selector of the tiles: sglang, sglang-legacy, heuristic, table:PATH")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Returns 0 if every step is right, else 1."""
    parser = _parser()
    args = parser.parse_args(argv)
    for name in ("prompt", "chunk", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name}: {getattr(args, name)} is not a positive number")
    device = _device(args.device)
    full = args.scale == "full" or (args.scale == "auto" and device.type == "cuda")
    scale = scenario.scaled(scenario.FULL if full else scenario.SMALL, args.prompt, args.chunk, args.batch)
    print(_introduction(device, scale, full))

    outcomes = []
    kinds = scenario.layers(scale)
    with progress(scale.num_steps() * len(kinds), "demo") as advance:
        for layer in kinds:
            for step in scenario.steps(layer, scale, getattr(torch, args.dtype), device, args.seed):
                advance(f"{layer.name}, {step.name}: {step.shape()}")
                outcomes.append(run_step(step, args.plan))
    print(format_table(HEADERS, [outcome.row() for outcome in outcomes]))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump([{**asdict(o), "passed": o.passed} for o in outcomes], file, indent=1)
    wrong = [o for o in outcomes if not o.passed]
    print(f"\n{len(outcomes) - len(wrong)} of {len(outcomes)} steps agree with the PyTorch reference in fp64.")
    for o in wrong:
        print(f"wrong: {o.layer}, {o.step}: error {o.error:.3e}, allowed {o.bound:.3e}", file=sys.stderr)
    return 1 if wrong else 0


def _introduction(device: torch.device, scale: scenario.Scale, full: bool) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    lines = [
        f"extend-attn on {where}: a KV pool of page size 1, slots in random order, D={scenario.HEAD_DIM}, "
        f"{scenario.NUM_Q_HEADS} query / {scenario.NUM_KV_HEADS} KV heads.",
        f"A prompt of {scale.prompt} tokens in chunks of {scale.chunk}, then {scale.batch} sequences verifying "
        f"{scale.draft} draft tokens, with a window of {scale.window} and with full attention.",
        "Each step is checked against the PyTorch reference in fp64.",
    ]
    if device.type == "cuda":
        lines.append("Times are of CUDA graph replays, without the host's part.")
    if not full:
        lines.append(f"Scaled down for {where} from a prompt of {scenario.FULL.prompt}; --scale full runs it all.")
    if device.type == "cpu":
        lines.append(
            "No GPU is used: "
            + (
                "Triton's interpreter runs the kernels"
                if interpreted()
                else "the PyTorch reference computes in fp32, and the tiles are those that an sm_90 GPU would run"
            )
            + "."
        )
    return "\n".join(lines) + "\n"
