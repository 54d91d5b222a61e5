"""Results files of the collective benches as text."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Tuple

from ...comm.sizes import format_bytes
from ..providers.base import OWN
from ..report import number, table
from .arithmetic import PUBLISHED_US

Result = Dict[str, Any]
Us = Dict[Tuple[str, str], float]  # (provider, algorithm) -> us


def _two(us: Optional[float]) -> str:
    return "-" if us is None else f"{us:.2f}" if us < 100 else number(us)


def _grid(results: List[Result], key: Callable[[Result], Any]) -> Dict[Any, Us]:
    found: Dict[Any, Us] = {}
    for one in results:
        if one["us"] is not None:
            found.setdefault(key(one), {})[one["provider"], one["algo"]] = one["us"]
    return found


def _name(column: Tuple[str, str]) -> str:
    provider, algo = column
    return algo if provider in (OWN, algo) else f"{provider} {algo}"


def _columns(results: List[Result]) -> List[Tuple[str, str]]:
    return list(dict.fromkeys((one["provider"], one["algo"]) for one in results if one["us"] is not None))


def link_rate(data: Dict[str, Any]) -> Optional[float]:
    """GB/s of one direction to hold a bus bandwidth against: nominal where it is known, else that of a large copy."""
    return data["ceilings"].get("link_gbps") or data["ceilings"].get("copy_gbps")


def all_reduce(data: Dict[str, Any]) -> str:
    """A table for each mode: us by size; auto's choice, bandwidth and share; the published line."""
    parts = []
    rate = link_rate(data)
    two_ranks = all(one["world"] == 2 and not one["virtual"] for one in data["results"])
    for mode in ("graph", "eager"):
        results = [one for one in data["results"] if one["mode"] == mode]
        if not any(one["us"] for one in results):
            continue
        columns = _columns(results)
        grid = _grid(results, lambda one: one["bytes"])
        chosen = {one["bytes"]: one.get("chosen") for one in results if one["algo"] == "auto"}
        bandwidth = {(one["bytes"], one["provider"], one["algo"]): one["busbw_gbps"] for one in results}
        lines = []
        for size, us in sorted(grid.items()):
            own = {column: time for column, time in us.items() if column[0] == OWN}
            best = min(own or us, key=us.get)  # type: ignore[arg-type]
            gbps = bandwidth[size, best[0], best[1]]
            cells = [format_bytes(size), *(_two(us.get(column)) for column in columns), chosen.get(size) or "-"]
            cells += [f"{gbps:.1f}", f"{100 * gbps / rate:.0f}%" if rate else "-"]
            cells += [_two(PUBLISHED_US.get(size))] if mode == "graph" and two_ranks else []
            lines.append(cells)
        header = ["bytes", *map(_name, columns), "auto is", "best GB/s", "of link"]
        header += ["published"] if mode == "graph" and two_ranks else []
        parts.append(f"all-reduce, {mode}, us:\n{table(header, lines)}")
    return "\n\n".join(parts)


def qknorm(data: Dict[str, Any]) -> str:
    return _by_row(data, "tp_qknorm", [("tokens", "tokens"), ("mode", "mode")])


def step(data: Dict[str, Any]) -> str:
    """us a step, and what communication costs in it: over the step without any."""
    text = _by_row(data, "decoder step", [("batch", "batch"), ("tokens", "tokens each"), ("mode", "mode")])
    lines = []
    for (batch, tokens), us in _grid(data["results"], lambda one: (one["batch"], one["tokens"])).items():
        base, own, nccl = (us.get(key) for key in (("none", "none"), (OWN, "auto"), ("nccl", "nccl")))
        if own and nccl:
            cells = [str(batch), str(tokens), f"{own / nccl:.3f}"]
            cells += [_two(own - base), _two(nccl - base)] if base else ["-", "-"]
            lines.append(cells)
    if lines:
        header = ["batch", "tokens each", "auto / nccl", "us of auto's calls", "us of nccl's"]
        text += "\n\n" + table(header, lines, left=0)
    return text


def capture(data: Dict[str, Any]) -> str:
    """ms a graph, what a graph costs more than with NCCL, and the exchanges of handles of all graphs together."""
    grid = _grid(data["results"], lambda one: (one["graphs"], one["collectives"]))
    columns = _columns(data["results"])
    lines = []
    for (graphs, collectives), us in grid.items():
        nccl = us.get(("nccl", "nccl"))
        cells = [str(graphs), str(collectives)]
        for column in columns:
            ms = us.get(column)
            more = f" ({(ms - nccl) / graphs / 1e3:+.2f})" if ms and nccl and column[0] == OWN else ""
            cells.append("-" if ms is None else f"{ms / graphs / 1e3:.2f}{more}")
        made = [one["exchanges"] for one in data["results"] if one["graphs"] == graphs and "exchanges" in one]
        lines.append([*cells, ", ".join(map(str, sorted(set(made)))) or "-"])
    header = ["graphs", "calls each", *map(_name, columns), "handle exchanges"]
    return "capture, ms a graph (in brackets: more than with NCCL):\n" + table(header, lines, left=0)


def _by_row(data: Dict[str, Any], title: str, keys: List[Tuple[str, str]]) -> str:
    columns = _columns(data["results"])
    grid = _grid(data["results"], lambda one: tuple(one[key] for key, _ in keys))
    lines = [[*map(str, row), *(_two(us.get(column)) for column in columns)] for row, us in grid.items()]
    return f"{title}, us:\n" + table([*(name for _, name in keys), *map(_name, columns)], lines, left=0)


def skipped(data: Dict[str, Any]) -> str:
    """Reasons, with how often and for whom."""
    found: Dict[Tuple[str, str, str], int] = {}
    for one in data["skipped"]:
        key = (one["provider"], one["algo"], one["reason"])
        found[key] = found.get(key, 0) + 1
    return "\n".join(f"  {provider} {algo}: {why} ({times}x)" for (provider, algo, why), times in found.items())


def report(data: Dict[str, Any]) -> str:
    """The whole report of a file."""
    ceilings = data["ceilings"]
    facts = [f"link {ceilings.get('link')}"]
    facts += [f"{ceilings['link_gbps']} GB/s nominal"] if ceilings.get("link_gbps") else []
    facts += [f"{ceilings['copy_gbps']} GB/s in a copy"] if ceilings.get("copy_gbps") else []
    head = f"{data['device']}, {data['date']}, {', '.join(f'{k} {v}' for k, v in data['versions'].items())}"
    body = {"all_reduce": all_reduce, "qknorm": qknorm, "step": step, "capture": capture}[data["kind"]]
    parts = [f"{head}\n{', '.join(facts)}", body(data) if data["results"] else "nothing was measured"]
    parts += [f"skipped:\n{skipped(data)}"] if data["skipped"] else []
    return "\n\n".join(part for part in parts if part)
