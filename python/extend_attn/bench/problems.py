"""The rows of the attention bench: shapes with a name, what each must at least move and compute, and so its floor.

A row is a batch of equal sequences: ``batch`` sequences with ``new_tokens`` queries each, behind ``prefix`` tokens that
are scattered over a pool of page size 1. Names and shapes are those under which the origin of this work published its
tile sweep (the first eight), plus shapes that its one rule makes slow. Imports neither torch nor triton.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Dict, List, NamedTuple, Optional, Tuple

from ..problem import Problem

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
POOL_BYTES = {**ITEM_BYTES, "float8_e4m3fn": 1, "float8_e5m2": 1}
SPREAD = 37  # coprime to the batch sizes in use: a ragged batch's lengths come in no order


@dataclass(frozen=True)
class Row:
    """One shape. ``window`` is the library's: position(q) <= position(k) + window; 0 is none. Causal always.

    ``kv_dtype`` is the pool's type if it is another; ``latent_v`` > 0 makes V the first so many columns of K (MLA);
    ``tree`` masks the new tokens as a draft tree; ``ragged`` spreads the prefixes evenly from 1 to ``prefix``;
    ``uneven`` spreads the new tokens so, and every other sequence has no prefix. Prefix slots come in runs of ``page``.
    """

    name: str
    batch: int
    new_tokens: int
    prefix: int
    window: int = 0
    head_dim: int = 256
    num_q_heads: int = 8
    num_kv_heads: int = 4
    dtype: str = "bfloat16"
    kv_dtype: str = ""
    latent_v: int = 0
    tree: bool = False
    ragged: bool = False
    uneven: bool = False
    page: int = 1

    def __post_init__(self) -> None:
        if self.batch < 1 or self.new_tokens < 1 or self.prefix < 0 or self.window < 0:
            raise ValueError(f"{self.name}: batch and new_tokens must be >= 1, prefix and window >= 0")
        if self.page < 1 or self.prefix % self.page:
            raise ValueError(f"{self.name}: a page of {self.page} slots does not divide the prefix of {self.prefix}")
        if self.num_kv_heads < 1 or self.num_q_heads % self.num_kv_heads:
            raise ValueError(f"{self.name}: {self.num_q_heads} query heads is no multiple of {self.num_kv_heads}")
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"{self.name}: dtype {self.dtype!r} is none of {sorted(ITEM_BYTES)}")
        if self.kv_dtype and self.kv_dtype not in POOL_BYTES:
            raise ValueError(f"{self.name}: kv_dtype {self.kv_dtype!r} is none of {sorted(POOL_BYTES)}")

    @property
    def plain(self) -> bool:
        """Whether this is a batch of equal sequences with nothing but a window: what every peer is asked for."""
        return not (self.kv_dtype or self.latent_v or self.tree or self.ragged or self.uneven)

    @property
    def head_dim_v(self) -> int:
        return self.latent_v or self.head_dim

    @property
    def prefixes(self) -> List[int]:
        """The prefix of each sequence."""
        if self.uneven:
            return [self.prefix * (b % 2) for b in range(self.batch)]
        return self._spread(self.prefix) if self.ragged else [self.prefix] * self.batch

    @property
    def new_lengths(self) -> List[int]:
        """The new tokens of each sequence."""
        return self._spread(self.new_tokens) if self.uneven else [self.new_tokens] * self.batch

    def _spread(self, most: int) -> List[int]:
        last = max(self.batch - 1, 1)
        return [1 + (most - 1) * (b * SPREAD % self.batch) // last for b in range(self.batch)]

    @property
    def num_tokens(self) -> int:
        return sum(self.new_lengths)

    @property
    def shape(self) -> str:
        """``batch,new,prefix,window`` as the published tables write it."""
        return f"{self.batch},{self.new_tokens},{self.prefix},{self.window or '-'}"

    @property
    def visible_keys(self) -> int:
        """Prefix keys, over the batch, that at least one query sees."""
        return sum(min(prefix, self.window) if self.window else prefix for prefix in self.prefixes)

    @property
    def visible_pairs(self) -> int:
        """(query, key) pairs over the batch that the causal mask and the window let through."""
        total = 0
        for prefix, new in zip(self.prefixes, self.new_lengths):
            for row in range(new):
                seen = prefix + row + 1
                total += min(seen, self.window + 1) if self.window else seen
        return total

    @property
    def bytes(self) -> int:
        """Least traffic of one call: each visible key and value once, each query once, each output once."""
        item = ITEM_BYTES[self.dtype]
        of_key = self.num_kv_heads * (self.head_dim if self.latent_v else 2 * self.head_dim)
        of_token = item * (of_key + self.num_q_heads * (self.head_dim + self.head_dim_v))
        of_tree = self.batch * self.new_tokens**2 if self.tree else 0
        pool = POOL_BYTES[self.kv_dtype or self.dtype]
        return pool * of_key * self.visible_keys + of_token * self.num_tokens + of_tree

    @property
    def flops(self) -> int:
        """Operations of one call over visible pairs alone: two products, a multiply and an add each."""
        return 2 * (self.head_dim + self.head_dim_v) * self.num_q_heads * self.visible_pairs

    def problem(self) -> Problem:
        """What the library's call of this row asks for."""
        return Problem(
            dtype=self.dtype, kv_dtype=self.kv_dtype, head_dim_qk=self.head_dim, head_dim_v=self.head_dim_v,
            num_q_heads=self.num_q_heads, num_kv_heads=self.num_kv_heads, batch_size=self.batch,
            num_tokens=self.num_tokens, max_len_extend=self.new_tokens, num_kv_indices=sum(self.prefixes),
            sliding_window=self.window, custom_mask=self.tree, v_aliases_k_pool=self.latent_v > 0,
            v_aliases_k_new=self.latent_v > 0,
        )  # fmt: skip

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
    Row("d64_prefill", 1, 8192, 0, 0, 64, 32, 8),
    Row("d96_prefill", 1, 8192, 0, 0, 96, 32, 8),
    Row("window_prefill", 1, 8192, 0, 1024),
    Row("one_chunk", 1, 512, 8192),
    Row("chunk16_pref", 16, 128, 2048),
    Row("long_pref", 1, 2048, 16384),
    Row("d512_extend_pref", 4, 1024, 4096, 0, 512, 8, 2),
    Row("uneven_prefill", 16, 4000, 4000, uneven=True),
    Row("fp8_extend_pref", 4, 1024, 4096, kv_dtype="float8_e4m3fn"),
    Row("extend_pref_page16", 4, 1024, 4096, page=16),
    Row("extend_pref_page64", 4, 1024, 4096, page=64),
    Row("decode32", 32, 1, 8000),
    Row("one_decode32k", 1, 1, 32000),
    Row("tree16", 32, 16, 1000, tree=True),
    Row("ragged16k", 32, 4, 16000, ragged=True),
    Row("mla_verify", 32, 4, 4000, 0, 576, 16, 1, latent_v=512),
    Row("gqa3_verify", 32, 4, 4000, 0, 128, 12, 4),
    Row("gqa5_verify", 32, 4, 4000, 0, 128, 20, 4),
    Row("gqa7_verify", 32, 4, 4000, 0, 128, 28, 4),
    Row("gqa16_verify", 32, 4, 4000, 0, 128, 64, 4),
    Row("fp8_verify_full8k", 32, 4, 8000, kv_dtype="float8_e4m3fn"),
    Row("fp8_decode64", 64, 1, 4000, 0, 128, 32, 8, kv_dtype="float8_e4m3fn"),
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
