"""A results file as a picture: each provider's time over the floor, row by row."""

from __future__ import annotations

from typing import Any, Dict

from .providers.base import OWN
from .report import fastest
from .results import time_us


def pyplot_or_error() -> Any:
    """matplotlib's pyplot, without a display; RuntimeError says how to install it."""
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("plot: matplotlib is missing; install it with pip install 'extend-attn[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(data: Dict[str, Any], path: str) -> None:
    """Write a PNG (or what the suffix says): lower is better, 1 is the floor. Needs matplotlib, no display."""
    pyplot = pyplot_or_error()
    found = fastest(data)
    if not found:
        raise ValueError("plot: the results hold no time")
    rows = list(found)
    providers = list(dict.fromkeys(r["provider"] for r in data["results"] if time_us(r) is not None))
    providers.sort(key=lambda name: name != OWN)
    figure, axes = pyplot.subplots(figsize=(max(7.0, 0.85 * len(rows) + 2), 5.0), constrained_layout=True)
    for i, provider in enumerate(providers):
        spread = 0.5 * (i / max(1, len(providers) - 1) - 0.5) if len(providers) > 1 else 0.0
        points = [
            (x + spread, time_us(found[row][provider]) / found[row][provider]["floor_us"])  # type: ignore[operator]
            for x, row in enumerate(rows)
            if provider in found[row] and found[row][provider]["floor_us"]
        ]
        if not points:
            continue
        own = provider == OWN
        marker, size, layer = ("*", 70, 3) if own else ("o", 32, 2)
        axes.scatter(*zip(*points), label=provider, s=size, marker=marker, zorder=layer)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylabel("time / floor (log scale)")
    axes.set_xticks(range(len(rows)), rows, rotation=40, ha="right")
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.grid(axis="y", which="both", linewidth=0.3)
    ceilings = data["ceilings"]
    axes.set_title(
        f"{data['device']}: floor from {ceilings['read_gbps']:.0f} GB/s and {ceilings['matmul_tflops']:.0f} TFLOP/s",
        fontsize=10,
    )
    axes.legend(fontsize=8, ncols=4)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
