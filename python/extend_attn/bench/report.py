"""A results file as text: every measurement, then the library beside each peer, then what the rows say together."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Optional, Sequence

from .problems import ROWS, Ceilings, Row, floor
from .providers.base import OWN
from .results import time_us

Result = Dict[str, Any]


def table(header: Sequence[str], lines: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns padded to their widest cell; the first ``left`` columns flush left, the others flush right."""
    cells = [list(header), *[list(line) for line in lines]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in cells
    )


def plan_text(plan: Optional[Dict[str, Any]]) -> str:
    """A plan in one short cell: ``packed 16x64 w4 s3 split 8 [heuristic]``."""
    if not plan:
        return "-"
    words: List[str] = [str(plan["family"])] if plan.get("family") else []
    tile = plan.get("tile")
    if isinstance(tile, dict):
        words.append(f"{tile.get('block_m')}x{tile.get('block_n')} w{tile.get('num_warps')}")
        if tile.get("num_stages") is not None:
            words.append(f"s{tile['num_stages']}")
    if plan.get("split_kv", 1) != 1:
        words.append(f"split {plan['split_kv']}")
    words += [name for name in ("pack_gqa", "tma", "pdl") if plan.get(name)]
    words += [f"gather {plan['gather']}"] if plan.get("gather") else []
    words += [f"page {plan['page_size']}"] if plan.get("page_size") else []
    words += [str(plan[name]) for name in ("backend", "beforehand") if plan.get(name)]
    if plan.get("source"):
        words.append(f"[{plan['source']}]")
    return " ".join(words) or "-"


def measurements(data: Dict[str, Any]) -> str:
    """One line a measurement."""
    ceilings = Ceilings(data["ceilings"]["read_gbps"], data["ceilings"]["matmul_tflops"])
    lines = []
    for result in data["results"]:
        us, row = time_us(result), ROWS.get(result["row"])
        lines.append(
            [
                result["row"],
                row.shape if row else "",
                result["provider"],
                number(result["us_graph"]),
                number(result["us_do_bench"]),
                rate(row, us, ceilings) if row and us else "-",
                f"{100 * result['floor_us'] / us:.0f}%" if us and result["floor_us"] else "-",
                f"{result['error']:.1e}" if result["error"] is not None else "-",
                plan_text(result["plan"]) if us else "WRONG RESULT, not timed",
            ]
        )
    header = ["row", "B,new,prefix,W", "provider", "us graph", "us do_bench", "rate", "of floor", "error", "  plan"]
    return table(header, [[*line[:-1], "  " + line[-1]] for line in lines], left=3)


def rate(row: Row, us: float, ceilings: Ceilings) -> str:
    """TFLOP/s where the floor is compute, GB/s where it is memory."""
    if floor(row, ceilings).bound == "compute":
        return f"{row.flops / us / 1e6:.0f} TFLOP/s"
    return f"{row.bytes / us / 1e3:.0f} GB/s"


def number(us: Optional[float]) -> str:
    return "-" if us is None else f"{us:.0f}" if us >= 1000 else f"{us:.1f}"


def fastest(data: Dict[str, Any]) -> Dict[str, Dict[str, Result]]:
    """row -> provider -> its fastest right result."""
    found: Dict[str, Dict[str, Result]] = {}
    for result in data["results"]:
        us = time_us(result)
        if us is None:
            continue
        best = found.setdefault(result["row"], {}).get(result["provider"])
        if best is None or us < time_us(best):  # type: ignore[operator]
            found[result["row"]][result["provider"]] = result
    return found


def comparison(data: Dict[str, Any]) -> str:
    """One line a row: the floor, the library, and each peer's time with the library's as a multiple of it."""
    found = fastest(data)
    peers = list(dict.fromkeys(r["provider"] for r in data["results"] if r["provider"] != OWN))
    lines = []
    for name, by_provider in found.items():
        own = by_provider.get(OWN)
        own_us = time_us(own) if own else None
        any_result = next(iter(by_provider.values()))
        cells = [name, number(any_result["floor_us"]), number(own_us)]
        ratios = []
        for peer in peers:
            us = time_us(by_provider[peer]) if peer in by_provider else None
            cells.append(number(us) + (f" ({own_us / us:.2f})" if us and own_us else ""))
            ratios += [own_us / us] if us and own_us else []
        cells.append(f"{max(ratios):.2f}" if ratios else "-")
        lines.append(cells)
    return table(["row", "floor", OWN, *[f"{p} (ours / it)" for p in peers], "ours / best peer"], lines)


def summary(data: Dict[str, Any]) -> str:
    """Geometric mean and worst of the library's time over each peer's, over the rows that both ran."""
    found = fastest(data)
    lines = []
    for peer in dict.fromkeys(r["provider"] for r in data["results"] if r["provider"] != OWN):
        ratios = {
            name: time_us(both[OWN]) / time_us(both[peer])  # type: ignore[operator]
            for name, both in found.items()
            if OWN in both and peer in both
        }
        if ratios:
            mean = math.exp(sum(math.log(r) for r in ratios.values()) / len(ratios))
            worst = max(ratios, key=lambda name: ratios[name])
            lines.append([peer, str(len(ratios)), f"{mean:.3f}", f"{ratios[worst]:.3f}", worst])
    if not lines:
        return ""
    return table(["time of ours over", "rows", "geometric mean", "worst", "at"], lines)


def finding(data: Dict[str, Any]) -> str:
    """Legacy against tuned tile, row by row, for our kernels and for SGLang's; empty if the run has neither pair."""
    times: Dict[str, Dict[str, float]] = {}
    for result in data["results"]:
        us = time_us(result)
        which = _tile_rule(result)
        if us and which:
            times.setdefault(result["row"], {})[which] = us
    lines = []
    for name, found in times.items():
        cells = [name]
        for who in ("ours", "sglang"):
            before, after = found.get(f"{who}-legacy"), found.get(f"{who}-tuned")
            cells += [number(before), number(after), f"{before / after:.2f}x" if before and after else "-"]
        cells.append(number(found.get("ours-own")))
        lines.append(cells)
    if not any("x" in cell for line in lines for cell in (line[3], line[6])):
        return ""
    header = ["row", "ours, legacy tile", "tuned tile", "gain"]
    header += ["sglang, legacy tile", "tuned tile", "gain", "ours, own plan"]
    return table(header, lines)


def _tile_rule(result: Result) -> Optional[str]:
    provider, source = result["provider"], str((result["plan"] or {}).get("source", ""))
    if provider == OWN:
        return {"sglang-legacy": "ours-legacy", "sglang": "ours-tuned"}.get(source, "ours-own")
    return provider if provider in ("sglang-legacy", "sglang-tuned") else None


def skipped(data: Dict[str, Any]) -> str:
    """What was not measured, rows with one reason on one line."""
    by_reason: Dict[tuple, List[str]] = {}
    for one in data.get("skipped", []):
        by_reason.setdefault((one["provider"], one["reason"]), []).append(one["row"])
    return "\n".join(f"  {who}: {why} ({', '.join(rows)})" for (who, why), rows in by_reason.items())


def report(data: Dict[str, Any]) -> str:
    """The whole report."""
    c = data["ceilings"]
    parts = [
        f"{data['device']}, {data['date']}, {', '.join(f'{k} {v}' for k, v in data['versions'].items())}\n"
        f"ceilings of this run: {c['read_gbps']:.0f} GB/s read, {c['matmul_tflops']:.1f} TFLOP/s",
        measurements(data),
        "us, graph replay where there is one; in brackets the library's time as a multiple of the peer's:\n"
        + comparison(data),
        summary(data),
        finding(data),
        f"skipped:\n{skipped(data)}" if data.get("skipped") else "",
    ]
    return "\n\n".join(part for part in parts if part)
