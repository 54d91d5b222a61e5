"""From measurements to a table of measured plans, as ``EXTEND_ATTN_TABLE`` and the packaged tables hold them."""

from __future__ import annotations

import json
import os
from typing import Any, Dict, List

from .results import write_json

SCHEMA = 1  # of the tables, see extend_attn.plan
# A plan that beats the heuristic's own by less than this does not replace it: so much, the order of measuring decides.
MARGIN = 1.02


def winners(measured: List[Dict[str, Any]], data: Dict[str, Any], sm_count: int) -> List[Dict[str, Any]]:
    """A table row for the fastest plan of each problem, which is the heuristic's own unless another beats it by MARGIN.

    measured: ``{problem, plan, us_graph}`` of each measurement; data: the run's results file, for device and date.
    """
    fastest: Dict[str, Dict[str, Any]] = {}

    def handicapped(one: Dict[str, Any]) -> float:
        return one["us_graph"] / (MARGIN if one["plan"].get("source") == "heuristic" else 1.0)

    for one in measured:
        key = json.dumps(one["problem"], sort_keys=True)
        if key not in fastest or handicapped(one) < handicapped(fastest[key]):
            fastest[key] = one
    return [
        {
            "device": data["device"],
            "sm_count": sm_count,
            "triton": data["versions"].get("triton", ""),
            "date": data["date"][:10],
            "command": data["command"],
            "problem": one["problem"],
            "plan": {name: value for name, value in one["plan"].items() if name != "source"},
            "us": round(one["us_graph"], 2),
            "own": one["plan"].get("source") == "heuristic",
        }
        for one in fastest.values()
    ]


def merge(path: str, arch: str, rows: List[Dict[str, Any]]) -> None:
    """Put rows into a table file; they replace what it held for the same device and problem.

    Raises ValueError if the file is a table of another architecture.
    """
    table: Dict[str, Any] = {"schema": SCHEMA, "arch": arch, "rows": []}
    if os.path.exists(path):
        with open(path) as file:
            table = json.load(file)
        if table.get("arch", arch) != arch:
            raise ValueError(f"table: {path} is for {table['arch']}, these plans were measured on {arch}")
    new = [(row["device"], row["problem"]) for row in rows]
    table["rows"] = [row for row in table["rows"] if (row["device"], row["problem"]) not in new] + rows
    write_json(table, path)
