"""The file a run leaves behind: one JSON object, checked on the way in and out.

``{schema: 1, kind, device, versions, command, date, ceilings: {...}, results: [...]}``; which fields a result has goes
by the kind (``FIELDS``). Times are microseconds of one call, medians; a time is null where the result was wrong
(``error`` says by how much) or, for ``us_graph``, where a graph cannot be captured. ``skipped`` lists what was asked
for and not measured, with the reason.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from typing import Any, Dict, List, Optional

SCHEMA = 1
_TOP = {"schema": int, "kind": str, "device": str, "versions": dict, "command": str, "date": str, "ceilings": dict}

TEXT, WHOLE, FLAG, NUMBER, TIME, OBJECT = "text", "whole", "flag", "number", "time", "object"
_EXPECTED = {
    TEXT: "a string",
    WHOLE: "a whole number",
    FLAG: "true or false",
    NUMBER: "a number or null",
    TIME: "more than 0, or null",
    OBJECT: "an object or null",
}
_COLLECTIVE = {
    "dtype": TEXT, "world": WHOLE, "virtual": FLAG, "algo": TEXT, "provider": TEXT, "mode": TEXT, "error": NUMBER,
}  # fmt: skip
# Fields of a result, by the file's kind; further ones may be there.
FIELDS: Dict[str, Dict[str, str]] = {
    "attention": {
        "row": TEXT, "provider": TEXT, "us_graph": TIME, "us_do_bench": TIME, "floor_us": NUMBER, "error": NUMBER,
        "plan": OBJECT,
    },
    "all_reduce": {"bytes": WHOLE, "us": TIME, "busbw_gbps": TIME, **_COLLECTIVE},
    "qknorm": {"tokens": WHOLE, "q_width": WHOLE, "k_width": WHOLE, "us": TIME, **_COLLECTIVE},
    "step": {"batch": WHOLE, "tokens": WHOLE, "us": TIME, **_COLLECTIVE},
    "capture": {"graphs": WHOLE, "collectives": WHOLE, "bytes": WHOLE, "us": TIME, **_COLLECTIVE},
}  # fmt: skip
KINDS = tuple(FIELDS)


def new_file(
    *, device: str, versions: Dict[str, str], command: str, ceilings: Dict[str, Any], kind: str = "attention"
) -> Dict[str, Any]:
    """A run's file with no result yet, dated now (ISO 8601, UTC)."""
    return {
        "schema": SCHEMA,
        "kind": kind,
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
        wrong.extend(f"results[{i}].{why}" for why in _wrong_result(result, FIELDS.get(str(data.get("kind")), {})))
    return wrong


def _wrong_result(result: Any, fields: Dict[str, str]) -> List[str]:
    if not isinstance(result, dict):
        return ["expected an object"]
    missing = [f"{name}: is missing" for name in fields if name not in result]
    return missing + [
        f"{name}: expected {_EXPECTED[kind]}, got {result[name]!r}"
        for name, kind in fields.items()
        if name in result and not _fits(result[name], kind)
    ]


def _fits(value: Any, kind: str) -> bool:
    if kind in (TEXT, FLAG):
        return isinstance(value, str if kind == TEXT else bool)
    if kind == WHOLE:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if value is None:
        return True
    if kind == OBJECT:
        return isinstance(value, dict)
    return _positive(value) if kind == TIME else isinstance(value, (int, float)) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def save(data: Dict[str, Any], path: str) -> None:
    """Write a valid file, all or nothing: a run that is cut short leaves what the last save held."""
    wrong = validate(data)
    if wrong:
        raise ValueError("results: " + "; ".join(wrong))
    write_json(data, path)


def write_json(data: Any, path: str) -> None:
    """Write a JSON file, all or nothing, into a folder that is made if need be."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as file:
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
