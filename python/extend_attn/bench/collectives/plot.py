"""An all-reduce run as a picture: us over bytes, by provider and algorithm, for each mode."""

from __future__ import annotations

from typing import Any, Dict, List, Tuple

from ...comm.sizes import format_bytes
from ..plot import pyplot_or_error
from ..providers.base import OWN
from .arithmetic import PUBLISHED_US


def plot(data: Dict[str, Any], path: str) -> None:
    """Write a PNG (or what the suffix says). RuntimeError: no matplotlib; ValueError: no times."""
    pyplot = pyplot_or_error()
    modes = [mode for mode in ("graph", "eager") if any(r["us"] and r["mode"] == mode for r in data["results"])]
    if not modes:
        raise ValueError("plot: the results hold no time")
    figure, every = pyplot.subplots(1, len(modes), figsize=(6.5 * len(modes), 5), squeeze=False, sharey=True,
                                    constrained_layout=True)  # fmt: skip
    sizes = sorted({one["bytes"] for one in data["results"]})
    two_gpus = all(one["world"] == 2 and not one["virtual"] for one in data["results"])
    for mode, axes in zip(modes, every[0]):
        for (provider, algo), points in _lines(data, mode).items():
            own = provider == OWN
            axes.plot(*zip(*points), label=f"{provider} {algo}" if provider != algo else provider,
                      marker="*" if algo == "auto" else "o" if own else "s", markersize=8 if algo == "auto" else 4,
                      linestyle="-" if own else "--", linewidth=1.2)  # fmt: skip
        if mode == "graph" and two_gpus:
            axes.plot(*zip(*PUBLISHED_US.items()), label="published, 2x H100", color="black", marker="_",
                      linestyle=":", markersize=12)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [format_bytes(size) for size in sizes], rotation=45, ha="right")
        axes.set_title(f"{mode}, us of the slowest rank", fontsize=10)
        axes.grid(which="both", linewidth=0.3)
        axes.legend(fontsize=8)
    world = data["results"][0]["world"]
    ranks = f"{world} virtual ranks on one" if data["results"][0]["virtual"] else f"{world}x"
    figure.suptitle(f"all-reduce, {data['results'][0]['dtype']}, {ranks} {data['device']}", fontsize=11)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _lines(data: Dict[str, Any], mode: str) -> Dict[Tuple[str, str], List[Tuple[int, float]]]:
    """(provider, algorithm) -> its (bytes, us), by size."""
    found: Dict[Tuple[str, str], List[Tuple[int, float]]] = {}
    for one in sorted(data["results"], key=lambda one: one["bytes"]):
        if one["mode"] == mode and one["us"]:
            found.setdefault((one["provider"], one["algo"]), []).append((one["bytes"], one["us"]))
    return found
