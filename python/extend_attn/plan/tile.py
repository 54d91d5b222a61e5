"""A tile and a plan: which kernel runs a problem, with which block sizes. Both are frozen and go to JSON and back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Dict, Mapping, Sequence, Union

# The plain Triton families, and their Gluon twins for Hopper, which do the same work.
PLAIN_FAMILIES = ("tiled", "packed")
HOPPER_FAMILIES = ("hopper_tiled", "hopper_packed")
FAMILIES = (*PLAIN_FAMILIES, *HOPPER_FAMILIES)
GATHERS = ("", "ahead", "beside")
BLOCK_MIN, BLOCK_MAX = 16, 256
BLOCK_M_MIN = 8  # the narrowest warpgroup product; the plain families take BLOCK_MIN rows and more
WARPS = (1, 2, 4, 8, 16, 32)
STAGES_MAX = 8
SPLITS_MAX = 1024
PROGRAMS_MAX = 4096


def _integer(name: str, value: Any) -> None:
    if type(value) is not int:
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}); expected int")


@dataclass(frozen=True)
class Tile:
    """Block sizes of one program: ``block_m`` query rows by ``block_n`` keys a step, warps, software pipeline stages.

    A row is a (new token, query head) pair: the packed family and ``pack_gqa`` put the query heads of one KV head side
    by side. Blocks are powers of two from 16 to 256; ValueError or TypeError otherwise.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        for name, smallest in (("block_m", BLOCK_M_MIN), ("block_n", BLOCK_MIN)):
            value = getattr(self, name)
            _integer(name, value)
            if not smallest <= value <= BLOCK_MAX or value & (value - 1):
                raise ValueError(f"{name}: got {value}; allowed are powers of two from {smallest} to {BLOCK_MAX}")
        _integer("num_warps", self.num_warps)
        if self.num_warps not in WARPS:
            raise ValueError(f"num_warps: got {self.num_warps}; allowed are {', '.join(map(str, WARPS))}")
        _integer("num_stages", self.num_stages)
        if not 1 <= self.num_stages <= STAGES_MAX:
            raise ValueError(f"num_stages: got {self.num_stages}; allowed are 1 to {STAGES_MAX}")

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n} w{self.num_warps} s{self.num_stages}"

    def to_json(self) -> Dict[str, int]:
        """A dict of the four fields."""
        return asdict(self)

    def merged(self, changes: Union[Tile, Mapping[str, Any], Sequence[int]]) -> Tile:
        """This tile changed: to a Tile, by a dict of some fields, or by (block_m, block_n[, warps[, stages]])."""
        if isinstance(changes, Tile):
            return changes
        if isinstance(changes, Mapping):
            return replace(self, **_known(Tile, "tile", changes))
        if isinstance(changes, Sequence) and not isinstance(changes, str) and 2 <= len(changes) <= 4:
            return replace(self, **dict(zip((f.name for f in fields(Tile)), changes)))
        wanted = "a Tile, a dict of its fields, or (block_m, block_n, num_warps, num_stages)"
        raise TypeError(f"tile: got {changes!r}; expected {wanted}")


@dataclass(frozen=True)
class Plan:
    """How a problem is run.

    ``family``: "tiled" (a flat grid over blocks of query rows; prefill and chunks) or "packed" (all query heads of a KV
    head and all new tokens in one tile's rows, one read of K/V; verify and decode); "hopper_tiled" and "hopper_packed"
    are the same in Gluon, for sm_90 alone. ``split_kv`` (packed, hopper_tiled) is the upper bound of programs that
    share one sequence's keys (hopper_tiled: one block's); on the device short sequences use fewer. ``programs``
    (hopper_packed), if > 0: so many programs share the keys of all sequences evenly instead, whatever their lengths.
    ``pack_gqa`` (tiled) puts the query heads of a KV head into one tile's rows. ``tma`` (tiled, sm_90+) loads the
    contiguous new K/V through TMA descriptors. ``pdl`` (sm_90+): a kernel is launched before the one ahead of it
    ends, and waits on the device: the combine kernel, and in the Hopper families the attention kernel. ``gather``
    (hopper_tiled): the prefixes are copied out of the pool, once, into contiguous rows, "ahead" by a kernel of their
    own or "beside" the walk over the new tokens, by warps of the attention kernel. ``source`` says who chose this plan;
    it takes no part in comparisons.
    """

    family: str
    tile: Tile
    split_kv: int = 1
    pack_gqa: bool = False
    tma: bool = False
    pdl: bool = False
    programs: int = 0
    gather: str = ""
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family: got {self.family!r}; allowed are {', '.join(FAMILIES)}")
        if not isinstance(self.tile, Tile):
            raise TypeError(f"tile: got {self.tile!r}; expected a Tile")
        _integer("split_kv", self.split_kv)
        if not 1 <= self.split_kv <= SPLITS_MAX:
            raise ValueError(f"split_kv: got {self.split_kv}; allowed are 1 to {SPLITS_MAX}")
        _integer("programs", self.programs)
        if not 0 <= self.programs <= PROGRAMS_MAX:
            raise ValueError(f"programs: got {self.programs}; allowed are 0 to {PROGRAMS_MAX}")
        if self.gather not in GATHERS:
            raise ValueError(f"gather: got {self.gather!r}; allowed are {', '.join(map(repr, GATHERS))}")
        for name in ("pack_gqa", "tma", "pdl"):
            if type(getattr(self, name)) is not bool:
                raise TypeError(f"{name}: got {getattr(self, name)!r}; it is a flag, True or False")
        if not isinstance(self.source, str):
            raise TypeError(f"source: got {self.source!r}; expected text")

    @property
    def packed(self) -> bool:
        """Whether all new tokens and heads of a KV head share a tile, and ``split_kv`` programs a sequence's keys."""
        return self.family.endswith("packed")

    @property
    def hopper(self) -> bool:
        """Whether the kernel is one of those written for sm_90."""
        return self.family in HOPPER_FAMILIES

    def __str__(self) -> str:
        parts = [self.family, str(self.tile)]
        if self.split_kv > 1:
            parts.append(f"split {self.split_kv}")
        if self.programs:
            parts.append(f"even {self.programs}")
        parts += [name for name in ("pack_gqa", "tma", "pdl") if getattr(self, name)]
        if self.gather:
            parts.append(f"gather {self.gather}")
        return " ".join(parts)

    def to_json(self) -> Dict[str, Any]:
        """A dict of JSON types with every field; ``tile`` is a dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Union[str, Mapping[str, Any]]) -> Plan:
        """The Plan of a dict (or its JSON text) with at least ``family``, ``tile.block_m`` and ``tile.block_n``.

        ValueError or TypeError names the field that is unknown, missing or out of range.
        """
        if isinstance(data, str):
            data = json.loads(data)
        values = _known(cls, "plan", data)
        for name in ("family", "tile"):
            if name not in values:
                raise ValueError(f"plan: missing field {name}")
        tile = values["tile"]
        if not isinstance(tile, Tile):
            tile = _known(Tile, "tile", tile)
            for name in ("block_m", "block_n"):
                if name not in tile:
                    raise ValueError(f"tile: missing field {name}")
            tile = Tile(**tile)
        return cls(**{**values, "tile": tile})

    def merged(self, changes: Mapping[str, Any]) -> Plan:
        """This plan with the fields that ``changes`` names; its tile may name only some of the tile's fields."""
        values = _known(Plan, "plan", changes)
        if "tile" in values:
            values["tile"] = self.tile.merged(values["tile"])
        return replace(self, **values)


def _known(cls: type, what: str, data: Any) -> Dict[str, Any]:
    """``data`` as a dict, once every key is a field of ``cls``."""
    if not isinstance(data, Mapping):
        raise TypeError(f"{what}: got {data!r}; expected a dict of {cls.__name__} fields")
    names = [f.name for f in fields(cls)]
    unknown = [str(key) for key in data if key not in names]
    if unknown:
        raise ValueError(f"{what}: unknown field {', '.join(unknown)}; known are {', '.join(names)}")
    return dict(data)
