"""Measured plans: JSON tables, where they are looked for, and which row speaks for a problem.

A table is one file::

    {"schema": 1, "arch": "sm_90", "rows": [{
        "device": "NVIDIA H200", "sm_count": 132, "triton": "3.6.0", "date": "2026-11-24", "command": "...",
        "problem": {...Problem.to_json()}, "plan": {...Plan.to_json()}, "us": 34.1}]}

``arch`` may be left out of a user's own table, whose rows are then matched by device and SM count only. The packaged
tables lie beside this file in ``tables/``, one an architecture. The user's own table is the one given as an argument,
else the file that ``EXTEND_ATTN_TABLE`` names, else ``table.json`` in the user's config folder. Files are read once a
process.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, TypeVar

from ..problem import Problem, bucket
from .device import DeviceSpec
from .heuristics import PACKED_MAX_LEN_EXTEND
from .tile import BLOCK_M_MIN, BLOCK_MIN, Plan

SCHEMA = 1
ENVIRONMENT = "EXTEND_ATTN_TABLE"
USER_FILE = "table.json"
PACKAGED = Path(__file__).with_name("tables")

# A row speaks for problems whose size buckets (powers of two) are at most this many octaves away.
OCTAVES_OF_BATCH = 1  # sequences x KV heads
OCTAVES_OF_EXTEND = 1  # beyond the packed regime; within it the rows must fill the same tile
OCTAVES_OF_PREFIX = 2
PREFERRED_EQUAL = ("is_causal", "custom_mask", "unified")
PREFIX_IS_LONG = 1 << 14  # tokens; from here on longer prefixes behave alike, and an unknown length counts as this


@dataclass(frozen=True)
class Row:
    """One measurement: ``plan`` took ``us`` microseconds for ``problem``, on this device, with this Triton.

    ``own``: nothing beat the heuristic's own plan. Such a row speaks for problems of its own sizes alone; for those
    near it the heuristic, which it confirms, knows better what changes with them.
    """

    device: str
    sm_count: int
    triton: str
    date: str
    command: str
    problem: Problem
    plan: Plan
    us: float
    own: bool = False

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """The Row of a dict; ValueError or TypeError names a missing or wrong field; further keys are ignored."""
        values = fields_of(data, _FIELDS)
        if not data["us"] > 0:
            raise ValueError(f"us: got {data['us']}; a time is positive")
        if type(data.get("own", False)) is not bool:
            raise TypeError(f"own: got {data['own']!r}; it is a flag, true or false")
        values.update(problem=Problem.from_json(data["problem"]), plan=Plan.from_json(data["plan"]))
        values.update(own=data.get("own", False))
        return cls(**values)


_FIELDS: Mapping[str, Any] = {
    "device": str,
    "sm_count": int,
    "triton": str,
    "date": str,
    "command": str,
    "problem": Mapping,
    "plan": Mapping,
    "us": (int, float),
}


@dataclass(frozen=True)
class Table:
    """The rows of one file; ``name`` is what ``Plan.source`` shows."""

    name: str
    arch: Optional[str]
    rows: Tuple[Row, ...]

    def matches(self, problem: Problem, device: DeviceSpec) -> Iterator[Plan]:
        """The plans of the rows that speak for ``problem`` on ``device``, nearest first.

        Rows of the same device, then of as many SMs, then of the architecture; among those the nearest sizes, then the
        same Triton, then file order.
        """
        ranked: List[Tuple[Tuple[int, int, bool, int], Row]] = []
        for number, row in enumerate(self.rows):
            closeness = self._device_rank(row, device)
            distance = _distance(row.problem.bucketed(), problem, row.plan)
            speaks = not row.own or row.problem.key() == problem.key()
            if closeness is not None and distance is not None and speaks:
                other_triton = not same_minor_version(row.triton, device.triton)
                ranked.append(((closeness, distance, other_triton, number), row))
        for (_, _, _, number), row in sorted(ranked, key=lambda item: item[0]):
            yield row.plan.merged({"source": f"table:{self.name}#{number}"})

    def _device_rank(self, row: Row, device: DeviceSpec) -> Optional[int]:
        if row.device == device.name:
            return 0
        if self.arch not in (None, device.arch):
            return None
        if row.sm_count == device.sm_count:
            return 1
        return 2 if self.arch == device.arch else None


def same_minor_version(a: str, b: str) -> bool:
    """Whether two versions share major and minor number ("3.6.0" and "3.6.1")."""
    return a.split(".")[:2] == b.split(".")[:2]


def _distance(row: Problem, problem: Problem, plan: Plan) -> Optional[int]:
    """How far a measured problem is from ``problem``, None where it, with its plan, says nothing about it."""
    if row.tuning_key() != problem.tuning_key():
        return None
    (pairs, extend, prefix), (pairs2, extend2, prefix2) = row.tuning_sizes(), problem.tuning_sizes()
    batch = _octaves(pairs, pairs2)
    new = _octaves(extend, extend2)
    old = _octaves(min(prefix, PREFIX_IS_LONG), min(prefix2, PREFIX_IS_LONG))
    if plan.packed and batch and (plan.split_kv > 1 or pairs2 < pairs):
        return None  # splits fill the GPU for one number of programs, and none do for this many or more
    if batch > OCTAVES_OF_BATCH or old > OCTAVES_OF_PREFIX:
        return None
    few = [n <= PACKED_MAX_LEN_EXTEND for n in (extend, extend2)]
    if plan.packed or any(few):
        if few[0] != few[1] or _tile_rows(row, plan) != _tile_rows(problem, plan):
            return None
    elif new > OCTAVES_OF_EXTEND:
        return None
    flags: int = sum(getattr(row, name) != getattr(problem, name) for name in PREFERRED_EQUAL)
    return 2 * batch + 2 * new + old + flags


def _tile_rows(problem: Problem, plan: Plan) -> int:
    return max(BLOCK_M_MIN if plan.hopper else BLOCK_MIN, bucket(problem.rows))


def _octaves(a: int, b: int) -> int:
    return abs(a.bit_length() - b.bit_length())


# -- files


@lru_cache(maxsize=64)
def load(path: str) -> Table:
    """The table of a file. ValueError names the file and, where there is one, the row and the field that is wrong."""
    return parse(read(path), path)


def read(path: str) -> str:
    """A table file's text; ValueError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"table: cannot read {path}: {error.strerror or error}") from error


def parse(text: str, path: str) -> Table:
    """The table of a file's text; ``path`` is for messages and for the name."""
    data, rows = parse_rows(text, path, Row.from_json)
    arch = data.get("arch")
    if arch is not None and not isinstance(arch, str):
        raise ValueError(f"table: {path}: arch: got {arch!r}; expected text such as 'sm_90'")
    return Table(os.path.basename(path), arch, rows)


T = TypeVar("T")


def parse_rows(text: str, path: str, row_of: Callable[[Any], T]) -> Tuple[Dict[str, Any], Tuple[T, ...]]:
    """The JSON object of a table file's text, and ``row_of`` of each of its rows; errors as ``load`` raises them."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"table: {path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"table: {path}: expected a JSON object, got {type(data).__name__}")
    if data.get("schema") != SCHEMA:
        raise ValueError(f"table: {path}: schema is {data.get('schema')!r}; this version reads schema {SCHEMA}")
    if not isinstance(data.get("rows"), list):
        raise ValueError(f"table: {path}: rows: expected a list, got {data.get('rows')!r}")
    rows = []
    for number, row in enumerate(data["rows"]):
        try:
            rows.append(row_of(row))
        except (TypeError, ValueError) as error:
            raise ValueError(f"table: {path}: row {number}: {error}") from error
    return data, tuple(rows)


def fields_of(data: Any, kinds: Mapping[str, Any]) -> Dict[str, Any]:
    """The values of a row's fields; ValueError or TypeError names a missing or wrong one; further keys are ignored."""
    if not isinstance(data, Mapping):
        raise TypeError(f"expected a JSON object, got {type(data).__name__}")
    for name, kind in kinds.items():
        if name not in data:
            raise ValueError(f"{name}: missing")
        if not isinstance(data[name], kind) or isinstance(data[name], bool):
            raise TypeError(f"{name}: got {data[name]!r}")
    return {name: data[name] for name in kinds}


def packaged_table(device: DeviceSpec) -> Optional[Table]:
    """The measured table that ships for this architecture, None if there is none."""
    path = PACKAGED / f"{device.arch}.json"
    return load(str(path)) if path.is_file() else None


def user_table_path(argument: Optional[str] = None) -> Optional[str]:
    """The user's table of measured plans, as ``user_file`` finds it."""
    return user_file(argument, ENVIRONMENT, USER_FILE)


def user_file(argument: Optional[str], variable: str, name: str) -> Optional[str]:
    """A table file of the user's: the argument, else what the environment variable names, else ``name`` in the config
    folder.

    None without any of them. Only the last may name a file that is not there.
    """
    named = argument or os.environ.get(variable)
    if named:
        return os.path.expanduser(named)
    return _config_file(os.environ.get("XDG_CONFIG_HOME"), name)


@lru_cache(maxsize=8)
def _config_file(config_home: Optional[str], name: str) -> Optional[str]:
    path = user_folder() / name
    return str(path) if path.is_file() else None


def user_folder() -> Path:
    """The user's config folder: platformdirs' where that is installed, else ``$XDG_CONFIG_HOME/extend_attn`` or
    ``~/.config/extend_attn``. It need not exist."""
    try:
        from platformdirs import user_config_path  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        home = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
        return Path(home) / "extend_attn"
    return Path(user_config_path("extend_attn", appauthor=False))


def forget() -> None:
    """Drops what was read, so that changed files are read again (see also ``select.forget``)."""
    load.cache_clear()
    _config_file.cache_clear()
