"""The file a run leaves behind: one JSON object, checked on the way in and out.

``{schema: 1, kind, device, versions, command, date, ceilings: {read_gbps, matmul_tflops}, results: [...]}`` with a
result ``{row, provider, us_graph, us_do_bench, floor_us, error, plan}``. Times are microseconds of one call, medians;
``us_graph`` is null where a graph cannot be captured, both are null where the result was wrong (``error`` says by how
much). ``skipped`` lists what was asked for and not measured, with the reason.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from typing import Any, Dict, List, Optional

SCHEMA = 1
KINDS = ("attention", "all_reduce", "qknorm", "step")
NUMBER = (int, float)

_TOP = {"schema": int, "kind": str, "device": str, "versions": dict, "command": str, "date": str, "ceilings": dict}
_RESULT = {"row": str, "provider": str}
_RESULT_NUMBERS = ("us_graph", "us_do_bench", "floor_us", "error")


def new_file(*, device: str, versions: Dict[str, str], command: str, ceilings: Dict[str, float]) -> Dict[str, Any]:
    """A run's file with no result yet, dated now (ISO 8601, UTC)."""
    return {
        "schema": SCHEMA,
        "kind": "attention",
        "device": device,
        "versions": versions,
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "ceilings": ceilings,
        "results": [],
        "skipped": [],
    }


def new_result(row: str, provider: str, floor_us: float, answer: Dict[str, Any]) -> Dict[str, Any]:
    """A result line from a worker's answer."""
    error = answer.get("error")

    def time_of(name: str) -> Optional[float]:
        us = answer.get(name)
        return round(us, 3) if us is not None and "failed" not in answer else None

    return {
        "row": row,
        "provider": provider,
        "us_graph": time_of("us_graph"),
        "us_do_bench": time_of("us_do_bench"),
        "floor_us": round(floor_us, 3),
        "error": float(f"{error:.4g}") if error is not None and math.isfinite(error) else None,
        "plan": answer.get("plan"),
    }


def validate(data: Any) -> List[str]:
    """What is wrong with a results file, one sentence each; empty if nothing is."""
    if not isinstance(data, dict):
        return ["the file is no JSON object"]
    wrong = [
        f"{name}: expected {kind.__name__}, got {data.get(name)!r}"
        for name, kind in _TOP.items()
        if not isinstance(data.get(name), kind) or isinstance(data.get(name), bool)
    ]
    if data.get("schema") != SCHEMA:
        wrong.append(f"schema: expected {SCHEMA}, got {data.get('schema')!r}")
    if data.get("kind") not in KINDS:
        wrong.append(f"kind: expected one of {', '.join(KINDS)}, got {data.get('kind')!r}")
    if isinstance(data.get("date"), str):
        try:
            datetime.datetime.fromisoformat(data["date"].replace("Z", "+00:00"))
        except ValueError:
            wrong.append(f"date: {data['date']!r} is not ISO 8601")
    ceilings = data.get("ceilings")
    if isinstance(ceilings, dict) and data.get("kind") == "attention":
        for name in ("read_gbps", "matmul_tflops"):
            if not _positive(ceilings.get(name)):
                wrong.append(f"ceilings.{name}: expected a positive number, got {ceilings.get(name)!r}")
    if not isinstance(data.get("results"), list):
        return [*wrong, "results: expected a list"]
    for i, result in enumerate(data["results"]):
        wrong.extend(f"results[{i}].{why}" for why in _wrong_result(result))
    return wrong


def _wrong_result(result: Any) -> List[str]:
    if not isinstance(result, dict):
        return ["expected an object"]
    wrong = [f"{name}: expected a string" for name in _RESULT if not isinstance(result.get(name), str)]
    for name in _RESULT_NUMBERS:
        if name not in result:
            wrong.append(f"{name}: is missing")
        elif result[name] is not None and (not isinstance(result[name], NUMBER) or isinstance(result[name], bool)):
            wrong.append(f"{name}: expected a number or null, got {result[name]!r}")
        elif name.startswith("us_") and result[name] is not None and not _positive(result[name]):
            wrong.append(f"{name}: expected more than 0, got {result[name]!r}")
    if not isinstance(result.get("plan", 0), (dict, type(None))):
        wrong.append("plan: expected an object or null" if "plan" in result else "plan: is missing")
    return wrong


def _positive(value: Any) -> bool:
    return isinstance(value, NUMBER) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def save(data: Dict[str, Any], path: str) -> None:
    """Write a valid file, all or nothing: a run that is cut short leaves what the last save held."""
    wrong = validate(data)
    if wrong:
        raise ValueError("results: " + "; ".join(wrong))
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    partial = f"{path}.partial"
    with open(partial, "w") as file:
        json.dump(data, file, indent=1)
        file.write("\n")
    os.replace(partial, path)


def load(path: str) -> Dict[str, Any]:
    """Read a file; ValueError with everything that is wrong in it."""
    with open(path) as file:
        data = json.load(file)
    wrong = validate(data)
    if wrong:
        raise ValueError(f"{path}: " + "; ".join(wrong))
    return data


def time_us(result: Dict[str, Any]) -> Optional[float]:
    """The time to compare by: graph replay, else the eager call, else None."""
    return result["us_graph"] if result["us_graph"] is not None else result["us_do_bench"]
