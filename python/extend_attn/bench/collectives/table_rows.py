"""From an all-reduce run to rows of the policy table (``extend_attn.comm.policy``): thresholds for each mode.

Dynamic programming over the measured sizes: the sequence of algorithms with the least sum of log times, where each
border costs ``MARGIN``. So noise between two equal algorithms makes no borders, and what a border costs at most is
known. NCCL pays the margin at every size: its sums are outside the promise of equal bits.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any, Dict, List, Mapping, Tuple

from ...comm.policy import ALGOS, MODES, OWN, Row, Threshold
from ...comm.sizes import format_bytes
from ...plan.tables import SCHEMA
from ..results import write_json

MARGIN = math.log(1.03)
MOST_PUSHED = 8 << 20  # bytes; a push's buffers are 2 x world times its largest message

Times = Mapping[int, Mapping[str, float]]  # bytes -> algorithm -> us


def times_of(data: Mapping[str, Any], mode: str) -> Dict[int, Dict[str, float]]:
    """The candidates' times in a results file: the library's algorithms and NCCL, not ``auto``."""
    found: Dict[int, Dict[str, float]] = {}
    for one in data["results"]:
        candidate = one["algo"] in (OWN if one["provider"] == "extend_attn" else ("nccl",))
        if candidate and one["mode"] == mode and one["us"] is not None:
            found.setdefault(one["bytes"], {})[one["algo"]] = one["us"]
    return found


def told_apart(eager: Times, graph: Times) -> Dict[int, Dict[str, float]]:
    """Eager times, those that the host decides put in the proportion of the replayed ones.

    The library's algorithms take the host one launch each. Where a replay is shorter than the cheapest eager call of
    the run, an eager call takes as long as its launch, which varies by more than algorithms differ (20 to 34 us in one
    run).
    """
    launch = min((us[algo] for us in eager.values() for algo in us if algo in OWN), default=0.0)
    found: Dict[int, Dict[str, float]] = {}
    for size, us in eager.items():
        gpu = graph.get(size, {})
        tied = [algo for algo in us if algo in OWN and gpu.get(algo, launch) < launch]
        least = min((us[algo] for algo in tied), default=0.0)
        found[size] = {
            algo: least * gpu[algo] / min(gpu[other] for other in tied) if algo in tied else time
            for algo, time in us.items()
        }
    return found


def thresholds(us: Times, *, virtual: bool = False) -> Tuple[Threshold, ...]:
    """The borders between measured sizes, each at the geometric mean of its neighbours; empty without a time."""
    costs = {size: _costs(size, us[size]) for size in sorted(us)}
    sizes = [size for size in costs if costs[size]]
    chosen = _cheapest([costs[size] for size in sizes])
    if not chosen:
        return ()
    borders = [i for i in range(len(chosen) - 1) if chosen[i] != chosen[i + 1]]
    found = [Threshold(math.isqrt(sizes[i] * sizes[i + 1]), chosen[i]) for i in borders]
    if chosen[-1] != "one_shot_push":
        return (*found, Threshold(None, chosen[-1]))
    return (*found, Threshold(sizes[-1], chosen[-1]), Threshold(None, "two_shot_pull" if virtual else "nccl"))


def _costs(size: int, us: Mapping[str, float]) -> Dict[str, float]:
    """Algorithm -> what choosing it for this size costs."""
    can = [algo for algo in ALGOS if algo in us and (algo != "one_shot_push" or size <= MOST_PUSHED)]
    return {algo: math.log(us[algo]) + (MARGIN if algo == "nccl" else 0.0) for algo in can}


def _cheapest(costs: List[Dict[str, float]]) -> List[str]:
    """The algorithm of each size: the cheapest path, by its last algorithm, extended size by size."""
    best: Dict[str, Tuple[float, List[str]]] = {"": (0.0, [])}
    for step in costs:
        extended = {}
        for algo, cost in step.items():
            ways = [(total + MARGIN * (last not in ("", algo)), path) for last, (total, path) in best.items()]
            total, path = min(ways, key=lambda way: way[0])
            extended[algo] = (total + cost, [*path, algo])
        best = extended
    return min(best.values(), key=lambda way: way[0])[1]


def rows_of(data: Mapping[str, Any], *, arch: str, link: str) -> List[Row]:
    """A row for each mode that a results file of kind ``all_reduce`` has times for."""
    rows = []
    times = {mode: times_of(data, mode) for mode in MODES}
    times["eager"] = told_apart(times["eager"], times["graph"])
    for mode in MODES:
        found = thresholds(times[mode], virtual=link == "virtual")
        if found:
            rows.append(
                Row(
                    arch=arch,
                    device=data["device"],
                    link=link,
                    world_size=data["results"][0]["world"],
                    mode=mode,
                    torch=data["versions"].get("torch", ""),
                    nccl=data["versions"].get("nccl", ""),
                    date=data["date"][:10],
                    command=data["command"],
                    thresholds=found,
                )
            )
    return rows


def merge(path: str, rows: List[Row]) -> None:
    """Put rows into a table file; they replace what it held for the same architecture, link, world size and mode."""
    held: List[Any] = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            held = [Row.from_json(one) for one in json.load(file)["rows"]]
    replaced = {(new.arch, new.link, new.world_size, new.mode) for new in rows}
    kept = [one for one in held if (one.arch, one.link, one.world_size, one.mode) not in replaced]
    write_json({"schema": SCHEMA, "rows": [one.to_json() for one in [*kept, *rows]]}, path)


def describe(row: Row) -> str:
    """A row in a line: ``graph: one_shot_push <= 512 KiB, nccl above``."""
    parts = [f"{one.algo} " + (f"<= {format_bytes(one.max_bytes)}" if one.max_bytes else "above")
             for one in row.thresholds]  # fmt: skip
    return f"{row.mode}: " + ", ".join(parts)
