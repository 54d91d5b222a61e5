"""Which all-reduce a call gets under ``algo="auto"``: thresholds by bytes, measured where somebody has measured.

A table is one file::

    {"schema": 1, "rows": [{
        "arch": "sm_90", "device": "NVIDIA H100 80GB HBM3", "link": "nvlink", "world_size": 2, "mode": "graph",
        "torch": "2.11.0", "nccl": "2.28.9", "date": "2026-11-25", "command": "...",
        "thresholds": [{"max_bytes": 524288, "algo": "one_shot_push"}, {"max_bytes": null, "algo": "nccl"}]}]}

Each threshold speaks for sizes above the one before it and up to its ``max_bytes``, the last (null) for all larger;
a push always has a limit, since its buffers are made for it.
A row answers calls of its architecture, link, world size and mode, and no others. The user's table (the argument, else
the file that ``EXTEND_ATTN_ALL_REDUCE_TABLE`` names, else ``all_reduce.json`` in the user's config folder) comes before
the packaged ``tables/all_reduce.json``, and that before the heuristic below. ``python -m extend_attn bench all-reduce
--table FILE`` writes rows. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

from ..plan import tables

ENVIRONMENT = "EXTEND_ATTN_ALL_REDUCE_TABLE"
USER_FILE = "all_reduce.json"
PACKAGED = Path(__file__).with_name("tables") / "all_reduce.json"

OWN = ("one_shot_push", "one_shot_pull", "two_shot_pull")
ALGOS = (*OWN, "nccl")
MODES = ("eager", "graph")
LINKS = ("nvlink", "pcie", "virtual")  # virtual: several ranks on one GPU, where NCCL can't run
WORLD_SIZES = range(2, 9)

KIB, MIB = 1 << 10, 1 << 20


class Choice(NamedTuple):
    """``algo`` is one of ALGOS; ``source`` is ``table:<file>#<row>`` or ``heuristic``."""

    algo: str
    source: str


@dataclass(frozen=True)
class Threshold:
    """``algo`` for sizes up to ``max_bytes``; None: however large."""

    max_bytes: Optional[int]
    algo: str


@dataclass(frozen=True)
class Row:
    """What a run measured for one architecture, link, world size and mode."""

    arch: str
    device: str
    link: str
    world_size: int
    mode: str
    torch: str
    nccl: str
    date: str
    command: str
    thresholds: Tuple[Threshold, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """The Row of a dict; ValueError or TypeError names a missing or wrong field; further keys are ignored."""
        values = tables.fields_of(data, _FIELDS)
        _check_key(values)
        values["thresholds"] = _thresholds(values["thresholds"], values["link"])
        return cls(**values)

    def to_json(self) -> Dict[str, Any]:
        """The dict that ``from_json`` reads."""
        return {**asdict(self), "thresholds": [asdict(one) for one in self.thresholds]}

    def speaks_for(self, arch: str, link: str, world_size: int, mode: str) -> bool:
        return (self.arch, self.link, self.world_size, self.mode) == (arch, link, world_size, mode)


_FIELDS: Mapping[str, Any] = {
    "arch": str,
    "device": str,
    "link": str,
    "world_size": int,
    "mode": str,
    "torch": str,
    "nccl": str,
    "date": str,
    "command": str,
    "thresholds": list,
}


def _check_key(values: Mapping[str, Any]) -> None:
    for name, allowed in (("link", LINKS), ("mode", MODES), ("world_size", WORLD_SIZES)):
        if values[name] not in allowed:
            raise ValueError(f"{name}: got {values[name]!r}; expected one of {', '.join(map(str, allowed))}")


def _thresholds(items: List[Any], link: str) -> Tuple[Threshold, ...]:
    """Checked: sizes rise, the last is null, algorithms are known and can run on the link."""
    if not items:
        raise ValueError("thresholds: expected at least one")
    allowed = OWN if link == "virtual" else ALGOS
    found: List[Threshold] = []
    for number, item in enumerate(items):
        where = f"thresholds[{number}]"
        if not isinstance(item, Mapping) or "max_bytes" not in item or "algo" not in item:
            raise ValueError(f"{where}: expected an object with max_bytes and algo, got {item!r}")
        limit, algo = item["max_bytes"], item["algo"]
        if algo not in allowed:
            raise ValueError(f"{where}.algo: got {algo!r}; expected one of {', '.join(allowed)} (link {link})")
        last = number == len(items) - 1
        if last != (limit is None):
            raise ValueError(f"{where}.max_bytes: got {limit!r}; null belongs in the last threshold and only there")
        if limit is None and algo == "one_shot_push":
            raise ValueError(f"{where}: one_shot_push needs a max_bytes: its buffers are made for it")
        before = found[-1].max_bytes if found else 0
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit <= (before or 0)):
            raise ValueError(f"{where}.max_bytes: got {limit!r}; expected an integer above {before}")
        found.append(Threshold(limit, algo))
    return tuple(found)


@dataclass(frozen=True)
class Table:
    """The rows of one file; ``name`` is what ``Choice.source`` shows."""

    name: str
    rows: Tuple[Row, ...]

    @classmethod
    def load(cls, path: str) -> Table:
        """The table of a file. ValueError names the file and, where there is one, the row and the field."""
        _, rows = tables.parse_rows(tables.read(path), path, Row.from_json)
        return cls(os.path.basename(path), rows)


@dataclass(frozen=True)
class Policy:
    """Tables in the order in which they are asked; the heuristic answers what none of them covers."""

    tables: Tuple[Table, ...] = ()

    @classmethod
    def load(cls, path: Optional[str] = None) -> Policy:
        """The policy of this process: the user's table (``path`` overrules the other places), then the packaged one."""
        found = [tables.user_file(path, ENVIRONMENT, USER_FILE), str(PACKAGED) if PACKAGED.is_file() else None]
        return cls(tuple(Table.load(file) for file in found if file))

    def digest(self) -> str:
        """Equal where every ``choose`` answers alike: ranks compare it before they trust each other's choices."""
        rows = [[row.to_json() for row in table.rows] for table in self.tables]
        heuristic = [[link, n, *map(asdict, heuristic_thresholds(link, n))] for link in LINKS for n in WORLD_SIZES]
        text = json.dumps([rows, heuristic], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def choose(self, *, world_size: int, nbytes: int, arch: str, link: str, mode: str) -> Choice:
        """The algorithm for a call of ``nbytes`` on GPUs of ``arch`` ("sm_90") joined by ``link``, eager or captured.

        Whether a buffer is large enough, and whether NCCL is there, the communicator knows: this is a preference.
        """
        thresholds, source = self.thresholds(world_size=world_size, arch=arch, link=link, mode=mode)
        for one in thresholds:
            if one.max_bytes is None or nbytes <= one.max_bytes:
                return Choice(one.algo, source)
        raise AssertionError("the last threshold has no limit")

    def thresholds(self, *, world_size: int, arch: str, link: str, mode: str) -> Tuple[Tuple[Threshold, ...], str]:
        """All sizes at once, and who says so."""
        _check_key({"link": link, "mode": mode, "world_size": world_size})
        for table in self.tables:
            for number, row in enumerate(table.rows):
                if row.speaks_for(arch, link, world_size, mode):
                    return row.thresholds, f"table:{table.name}#{number}"
        return heuristic_thresholds(link, world_size), "heuristic"

    def push_limit(self, world_size: int, arch: str, link: str) -> int:
        """The largest size (bytes) for which ``choose`` says one_shot_push in either mode; 0 if it never does."""
        limit = 0
        for mode in MODES:
            for one in self.thresholds(world_size=world_size, arch=arch, link=link, mode=mode)[0]:
                if one.algo == "one_shot_push":
                    limit = max(limit, one.max_bytes or 0)
        return limit


# What is assumed where nothing was measured, in either mode. A push has no meeting and so the lowest latency, but needs
# buffers of 2 x world times its message. Between two H100 push and pull both take 28 us for 8 MiB, and at 4 MiB push is
# ahead (14.5 and 16.1), while NCCL takes 47 and 33 (docs/all_reduce.md); published curves end at 8 MiB, too.
MOST_CUSTOM = 8 * MIB
PUSH_PAIR = 4 * MIB
# World size -> where two shots overtake one: one shot moves (n - 1) times the data, two shots 2 (n - 1) / n times it.
# The values are those of vLLM's custom all-reduce for NVLink, in use since 2024.
ONE_SHOT = {3: 512 * KIB, 4: 512 * KIB, 5: 256 * KIB, 6: 256 * KIB, 7: 256 * KIB, 8: 256 * KIB}
# Over PCIe peers write well (posted) and read badly; two GPUs and small messages only, as vLLM also restricts itself.
PUSH_PCIE = 64 * KIB


def heuristic_thresholds(link: str, world_size: int) -> Tuple[Threshold, ...]:
    """The default where no row speaks. ``virtual`` follows NVLink and never says nccl."""
    if link == "pcie":
        return (Threshold(PUSH_PCIE, "one_shot_push"), Threshold(None, "nccl")) if world_size == 2 else _ALL_NCCL
    if world_size == 2:
        small, large = Threshold(PUSH_PAIR, "one_shot_push"), "one_shot_pull"
    else:
        small, large = Threshold(ONE_SHOT[world_size], "one_shot_push"), "two_shot_pull"
    if link == "virtual":
        return (small, Threshold(None, large))
    return (small, Threshold(MOST_CUSTOM, large), Threshold(None, "nccl"))


_ALL_NCCL = (Threshold(None, "nccl"),)
