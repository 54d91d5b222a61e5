"""The rows of the attention bench: shapes with a name, what each must at least move and compute, and so its floor.

A row is a batch of equal sequences: ``batch`` sequences with ``new_tokens`` queries each, behind ``prefix`` tokens that
are scattered over a pool of page size 1. Names and shapes are those under which the origin of this work published its
tile sweep (the first eight), plus shapes that its one rule makes slow. Imports neither torch nor triton.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Dict, List, NamedTuple, Optional, Tuple

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Row:
    """One shape. ``window`` is the library's: position(q) <= position(k) + window; 0 is none. Causal always."""

    name: str
    batch: int
    new_tokens: int
    prefix: int
    window: int = 0
    head_dim: int = 256
    num_q_heads: int = 8
    num_kv_heads: int = 4
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.batch < 1 or self.new_tokens < 1 or self.prefix < 0 or self.window < 0:
            raise ValueError(f"{self.name}: batch and new_tokens must be >= 1, prefix and window >= 0")
        if self.num_kv_heads < 1 or self.num_q_heads % self.num_kv_heads:
            raise ValueError(f"{self.name}: {self.num_q_heads} query heads is no multiple of {self.num_kv_heads}")
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"{self.name}: dtype {self.dtype!r} is none of {sorted(ITEM_BYTES)}")

    @property
    def num_tokens(self) -> int:
        return self.batch * self.new_tokens

    @property
    def shape(self) -> str:
        """``batch,new,prefix,window`` as the published tables write it."""
        return f"{self.batch},{self.new_tokens},{self.prefix},{self.window or '-'}"

    @property
    def visible_keys(self) -> int:
        """Keys of one sequence that at least one of its queries sees."""
        prefix = min(self.prefix, self.window) if self.window else self.prefix
        return prefix + self.new_tokens

    @property
    def visible_pairs(self) -> int:
        """(query, key) pairs of one sequence that the mask lets through."""
        total = 0
        for row in range(self.new_tokens):
            seen = self.prefix + row + 1
            total += min(seen, self.window + 1) if self.window else seen
        return total

    @property
    def bytes(self) -> int:
        """Least traffic of one call: each visible key and value once, each query once, each output once."""
        item, heads_keys = ITEM_BYTES[self.dtype], self.num_kv_heads * self.visible_keys
        per_sequence = 2 * heads_keys * self.head_dim + 2 * self.num_q_heads * self.new_tokens * self.head_dim
        return item * self.batch * per_sequence

    @property
    def flops(self) -> int:
        """Operations of one call over visible pairs alone: two products, a multiply and an add each."""
        return 4 * self.head_dim * self.num_q_heads * self.batch * self.visible_pairs

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> Row:
        return cls(**data)

    @classmethod
    def parse(cls, text: str) -> Row:
        """A row from ``B,E,P,W`` or ``B,E,P,W,D,Hq,Hkv`` (W: ``-`` or 0 for none)."""
        parts = ["0" if part.strip() == "-" else part.strip() for part in text.split(",")]
        if len(parts) not in (4, 7) or not all(part.isdigit() for part in parts):
            raise ValueError(f"shape: {text!r} is not B,E,P,W or B,E,P,W,D,Hq,Hkv")
        return cls("shape_" + "_".join(parts), *(int(part) for part in parts))


class Ceilings(NamedTuple):
    """What this machine reached in the same run: a big read, and an 8192^3 bf16 matrix product."""

    read_gbps: float
    matmul_tflops: float


# One H200, seen together with the published table: only for listings made where nothing can be measured.
NOMINAL = Ceilings(read_gbps=4555.0, matmul_tflops=793.0)


class Floor(NamedTuple):
    """The time (us) under which no implementation can come, and what sets it: ``memory`` or ``compute``."""

    us: float
    bound: str


def floor(row: Row, ceilings: Ceilings) -> Floor:
    """max(bytes / read bandwidth, FLOPs / matmul rate)."""
    memory_us = row.bytes / ceilings.read_gbps / 1e3
    compute_us = row.flops / ceilings.matmul_tflops / 1e6
    return Floor(memory_us, "memory") if memory_us >= compute_us else Floor(compute_us, "compute")


PUBLISHED: Tuple[Row, ...] = (
    Row("prefill_long", 1, 8192, 0),
    Row("prefill_chat", 1, 1000, 0),
    Row("verify_chat", 32, 4, 1000, 1024),
    Row("verify_summ", 32, 4, 8000, 1024),
    Row("verify_burst", 32, 4, 64, 1024),
    Row("chunk8", 8, 512, 0),
    Row("chunk16", 16, 1024, 0),
    Row("chunk32", 32, 512, 0),
)

MORE: Tuple[Row, ...] = (
    Row("prefill_multi", 4, 1000, 0),
    Row("verify_full8k", 32, 4, 8000),
    Row("extend_pref", 4, 1024, 4096),
    Row("one_verify", 1, 4, 8000),
    Row("d128_prefill", 1, 8192, 0, 0, 128, 32, 8),
    Row("d128_verify", 32, 4, 8000, 0, 128, 32, 8),
    Row("d128_extend_pref", 4, 1024, 4096, 0, 128, 32, 8),
    Row("d128_decode64", 64, 1, 4000, 0, 128, 32, 8),
    Row("d512_prefill", 1, 4096, 0, 0, 512, 8, 2),
    Row("d512_verify", 32, 4, 8000, 0, 512, 8, 2),
)

# For a machine without a GPU: the same kinds of work, small enough for the reference.
TINY: Tuple[Row, ...] = (
    Row("tiny_prefill", 1, 128, 0, 0, 64, 4, 2, "float32"),
    Row("tiny_verify", 4, 4, 200, 64, 64, 4, 2, "float32"),
)

ROWS: Dict[str, Row] = {row.name: row for row in PUBLISHED + MORE + TINY}


def rows_named(names: Optional[str], *, on_gpu: bool = True) -> List[Row]:
    """Rows for ``--rows``: names, ``published``, ``all`` or ``tiny``, separated by commas. None: all (CPU: tiny)."""
    groups = {"published": PUBLISHED, "all": PUBLISHED + MORE, "tiny": TINY}
    if names is None:
        names = "all" if on_gpu else "tiny"
    chosen: List[Row] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in groups and name not in ROWS:
            raise ValueError(f"rows: {name!r} is none of {', '.join([*groups, *ROWS])}")
        chosen.extend(row for row in groups.get(name, (ROWS.get(name),)) if row not in chosen)
    return chosen
