"""What one attention call asks for, in numbers that the host knows before anything runs.

A ``Problem`` holds no tensor, no pointer and no length that lives on the GPU, so it can be hashed, printed, written to
JSON, sent with a bug report and replayed. It validates itself; nothing below it checks again. This module imports
neither torch nor triton.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

FP8_TYPES = ("float8_e4m3fn", "float8_e5m2")
QUERY_TYPES = ("bfloat16", "float16", "float32")
INDEX_TYPES = ("int32", "int64")
ELEMENT_SIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1, "float8_e5m2": 1}
HEAD_DIM_MIN, HEAD_DIM_MAX = 16, 576
ALIGNMENTS = (1, 2, 4, 8, 16)

_POSITIVE = ("num_q_heads", "num_kv_heads")
_COUNTS = ("batch_size", "num_tokens", "max_len_extend", "num_kv_indices")
_SIZES = ("head_dim_qk", "head_dim_v", *_POSITIVE, *_COUNTS, "sliding_window", "xai_temperature_len", "alignment")
_FLAGS = (
    "is_causal",
    "custom_mask",
    "mask_prefix",
    "window_offsets",
    "q_positions",
    "sinks",
    "return_lse",
    "unified",
    "v_aliases_k_pool",
    "v_aliases_k_new",
    "batch_invariant",
)


def bucket(n: int) -> int:
    """The power of two that ``n`` is rounded up to (0 stays 0)."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def size_class(n: int) -> int:
    """``n`` rounded up to one of four sizes an octave, from 16 on: 0 to 16, 20, 24, 28, 32, 40, ..."""
    step = 1 << (n - 1).bit_length() - 3 if n > 16 else 1
    return -(-n // step) * step


@dataclass(frozen=True)
class Problem:
    """One call, as the host sees it. Types are torch's names without ``torch.``; lengths are in tokens.

    ``num_tokens`` counts the rows of q, ``num_kv_indices`` the elements of ``kv_indices``; both may exceed what is used
    (engines preallocate). ``max_len_extend`` and ``max_len_prefix`` are upper bounds over the batch; without the latter
    (None) the host knows nothing about prefix lengths. ``batch_size`` may be 0. ``alignment`` (bytes, 1 to 16) is the
    largest power of two that divides every base pointer and row or head stride of q, k, v, o and the pools.

    Raises ValueError (or TypeError, where a count is no integer) naming the field. ``sliding_window <= 0`` becomes -1,
    an empty ``kv_dtype`` or ``out_dtype`` the query's type, and ``mask_prefix`` True for a unified call with a mask,
    whose mask always covers the prefix.
    """

    dtype: str
    head_dim_qk: int
    head_dim_v: int
    num_q_heads: int
    num_kv_heads: int
    batch_size: int
    num_tokens: int
    max_len_extend: int
    num_kv_indices: int
    kv_dtype: str = ""
    out_dtype: str = ""
    index_dtype: str = "int64"
    max_len_prefix: Optional[int] = None
    is_causal: bool = True
    custom_mask: bool = False
    mask_prefix: bool = False
    sliding_window: int = -1
    window_offsets: bool = False
    q_positions: bool = False
    sinks: bool = False
    logit_cap: float = 0.0
    xai_temperature_len: int = -1
    return_lse: bool = False
    unified: bool = False
    v_aliases_k_pool: bool = False
    v_aliases_k_new: bool = False
    batch_invariant: bool = False
    alignment: int = 16

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        if not self.kv_dtype:
            set_field(self, "kv_dtype", self.dtype)
        if not self.out_dtype:
            set_field(self, "out_dtype", self.dtype)
        self._check_types()
        self._check_sizes()
        if self.sliding_window <= 0:
            set_field(self, "sliding_window", -1)
        if self.xai_temperature_len < 0:
            set_field(self, "xai_temperature_len", -1)
        if self.unified and self.custom_mask:
            set_field(self, "mask_prefix", True)
        self._check_together()

    def _check_types(self) -> None:
        if self.dtype not in QUERY_TYPES:
            raise ValueError(f"dtype: got {self.dtype!r}; allowed are {', '.join(QUERY_TYPES)}")
        if self.kv_dtype != self.dtype and self.kv_dtype not in FP8_TYPES:
            allowed = ", ".join((self.dtype, *FP8_TYPES))
            raise ValueError(f"kv_dtype: got {self.kv_dtype!r}; for dtype {self.dtype} allowed are {allowed}")
        if self.out_dtype != self.dtype and self.out_dtype != "float32":
            raise ValueError(f"out_dtype: got {self.out_dtype!r}; allowed are {self.dtype} and float32")
        if self.index_dtype not in INDEX_TYPES:
            raise ValueError(f"index_dtype: got {self.index_dtype!r}; allowed are int32 and int64")
        values = self.__dict__
        for name in _FLAGS:
            if type(values[name]) is not bool:
                raise TypeError(f"{name}: got {values[name]!r}; it is a flag, True or False")

    def _check_sizes(self) -> None:
        values = self.__dict__
        for name in _SIZES:
            if type(values[name]) is not int:
                raise TypeError(f"{name}: got {values[name]!r} ({type(values[name]).__name__}); expected int")
        for name in ("head_dim_qk", "head_dim_v"):
            if not HEAD_DIM_MIN <= values[name] <= HEAD_DIM_MAX:
                raise ValueError(f"{name}: got {values[name]}; allowed are {HEAD_DIM_MIN} to {HEAD_DIM_MAX}")
        for name in _POSITIVE:
            if values[name] < 1:
                raise ValueError(f"{name}: got {values[name]}; at least 1 is needed")
        for name in _COUNTS:
            if values[name] < 0:
                raise ValueError(f"{name}: got {values[name]}; a count is not negative")
        if self.max_len_prefix is not None:
            if type(self.max_len_prefix) is not int:
                raise TypeError(f"max_len_prefix: got {self.max_len_prefix!r}; expected int or None")
            if self.max_len_prefix < 0:
                raise ValueError(f"max_len_prefix: got {self.max_len_prefix}; allowed are lengths >= 0 and None")
        if self.xai_temperature_len in (0, 1):
            raise ValueError(
                f"xai_temperature_len: got {self.xai_temperature_len}; a length is at least 2, and -1 turns it off"
            )
        if self.alignment not in ALIGNMENTS:
            raise ValueError(f"alignment: got {self.alignment}; allowed are 1, 2, 4, 8 and 16 bytes")
        if type(self.logit_cap) not in (float, int):
            raise TypeError(f"logit_cap: got {self.logit_cap!r}; expected a float")
        if not (0 <= self.logit_cap < math.inf):  # also false for NaN
            raise ValueError(f"logit_cap: got {self.logit_cap}; allowed are finite values >= 0 (0 turns it off)")

    def _check_together(self) -> None:
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads: got {self.num_q_heads}, not divisible by the {self.num_kv_heads} KV heads (num_kv_heads)"
            )
        if self.mask_prefix and not self.custom_mask:
            raise ValueError("mask_prefix: got True without custom_mask; set custom_mask=True too")
        for name in ("v_aliases_k_pool", "v_aliases_k_new"):
            if getattr(self, name) and self.head_dim_v > self.head_dim_qk:
                raise ValueError(
                    f"{name}: got True with head_dim_v {self.head_dim_v} > head_dim_qk {self.head_dim_qk}; "
                    "a value that is part of its key is not longer than it"
                )
        if self.unified and self.v_aliases_k_new:
            raise ValueError("v_aliases_k_new: got True on a unified call, which has no tensor of new keys")

    # -- derived facts

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def rows(self) -> int:
        """Upper bound of the packed rows (new tokens x query heads) of one sequence and KV head."""
        return self.max_len_extend * self.group

    @property
    def packed_rows(self) -> int:
        """``rows`` as the height of a packed tile: a power of two of at least 16."""
        return max(16, bucket(self.rows))

    @property
    def has_prefix(self) -> bool:
        """Whether keys may come from the pool, as far as a plan is concerned (``max_len_prefix`` is believed)."""
        return self.num_kv_indices > 0 and (self.unified or self.max_len_prefix != 0)

    @property
    def has_pool(self) -> bool:
        """Whether a pool is given, whatever lengths say: what kernels are specialised for."""
        return self.num_kv_indices > 0 or self.unified

    @property
    def prefix_bound(self) -> Optional[int]:
        """Upper bound of the prefix keys that one sequence reads (``max_len_prefix``, the window), None if unknown."""
        bounds = [n for n in (self.max_len_prefix, self.sliding_window) if n is not None and n >= 0]
        return min(bounds) if bounds else None

    @property
    def longest_prefix(self) -> int:
        """The most prefix keys that one sequence may read: one sequence may own all of ``kv_indices``."""
        return self.num_kv_indices if self.prefix_bound is None else min(self.num_kv_indices, self.prefix_bound)

    @property
    def prefix_hint(self) -> int:
        """A guess of a sequence's prefix keys, for choosing a plan only: ``prefix_bound``, but at most an equal share
        of ``kv_indices``, which may be a preallocated array and then says nothing."""
        share = -(-self.num_kv_indices // max(self.batch_size, 1))
        return share if self.prefix_bound is None else min(share, self.prefix_bound)

    def bucketed(self) -> Problem:
        """This problem with every length and count rounded up to its ``size_class``, and its window to a power of two:
        what plans are chosen for."""
        prefix = self.max_len_prefix
        return replace(
            self,
            batch_size=size_class(self.batch_size),
            num_tokens=size_class(self.num_tokens),
            max_len_extend=size_class(self.max_len_extend),
            num_kv_indices=size_class(self.num_kv_indices),
            max_len_prefix=None if prefix is None else size_class(prefix),
            sliding_window=bucket(self.sliding_window) if self.sliding_window > 0 else -1,
        )

    def key(self) -> Tuple[Any, ...]:
        """What a cached plan or launcher depends on: types, dims, flags and alignment exactly, lengths and counts as
        ``bucketed`` rounds them, values that kernels take at run time (cap, temperature length) only as on or off."""
        prefix = self.max_len_prefix
        return (
            self.dtype,
            self.kv_dtype,
            self.out_dtype,
            self.index_dtype,
            self.head_dim_qk,
            self.head_dim_v,
            self.num_q_heads,
            self.num_kv_heads,
            self.alignment,
            self.is_causal,
            self.custom_mask,
            self.mask_prefix,
            self.window_offsets,
            self.q_positions,
            self.sinks,
            self.logit_cap > 0,
            self.xai_temperature_len > 0,
            self.return_lse,
            self.unified,
            self.v_aliases_k_pool,
            self.v_aliases_k_new,
            self.batch_invariant,
            size_class(self.batch_size),
            size_class(self.num_tokens),
            size_class(self.max_len_extend),
            size_class(self.num_kv_indices),
            None if prefix is None else size_class(prefix),
            bucket(self.sliding_window) if self.sliding_window > 0 else -1,
        )

    def tuning_key(self) -> Tuple[Any, ...]:
        """What a measured plan must share with a problem to speak for it: types, dims and what shapes the inner loop.

        Sizes (batch, lengths) are not in it, and neither are masks and the unified layout, whose best tiles differ
        little: plan/tables.py takes the row that is nearest in these (``tuning_sizes``).
        """
        return (
            self.dtype,
            self.kv_dtype,
            self.head_dim_qk,
            self.head_dim_v,
            self.group,
            self.has_prefix,
            self.sliding_window > 0,
            self.v_aliases_k_pool,
            self.v_aliases_k_new,
            self.batch_invariant,
        )

    def tuning_sizes(self) -> Tuple[int, int, int]:
        """Buckets that measured rows are compared by: (sequences x KV heads, ``max_len_extend``, ``prefix_hint``)."""
        return bucket(self.batch_size * self.num_kv_heads), bucket(self.max_len_extend), bucket(self.prefix_hint)

    # -- JSON

    def to_json(self) -> Dict[str, Any]:
        """A dict of JSON types with every field."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Union[str, Mapping[str, Any]]) -> Problem:
        """The Problem of a dict (or its JSON text).

        Fields with a default may be left out; ValueError names one that is missing or unknown.
        """
        if isinstance(data, str):
            data = json.loads(data)
        if not isinstance(data, Mapping):
            raise ValueError(f"problem: expected a JSON object, got {type(data).__name__}")
        names = [f.name for f in fields(cls)]
        unknown = sorted(set(data) - set(names))
        if unknown:
            raise ValueError(f"problem: unknown field {', '.join(unknown)}; known are {', '.join(names)}")
        missing = [n for n in names[: names.index("kv_dtype")] if n not in data]
        if missing:
            raise ValueError(f"problem: missing field {', '.join(missing)}")
        return cls(**data)

    # -- warm-up

    @classmethod
    def for_model(
        cls,
        *,
        head_dim: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim_v: Optional[int] = None,
        dtype: str = "bfloat16",
        batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256),
        max_len_extend: Union[int, Sequence[int]] = (1, 4, 8192),
        sliding_window: Union[int, Sequence[int]] = -1,
        prefix: Sequence[bool] = (False, True),
        max_context: int = 32768,
        **flags: Any,
    ) -> List[Problem]:
        """The problems that a model's layers pose, for ``warmup``: every batch size with every extend length and
        window, with and without a prefix, one problem a ``key()``.

        ``max_len_extend`` are the bounds that the engine will pass (1 for decode, the number of draft tokens, the
        prefill chunk), ``sliding_window`` one window or one for each kind of layer, ``max_context`` (tokens) sizes the
        preallocated ``kv_indices`` of a call with a prefix. ``flags`` are further fields, equal in all problems.
        """
        found: Dict[Tuple[Any, ...], Problem] = {}
        for length in _as_tuple(max_len_extend):
            for batch_size in batch_sizes:
                for window in _as_tuple(sliding_window):
                    for with_pool in (True,) if flags.get("unified") else prefix:
                        problem = cls(
                            dtype=dtype,
                            head_dim_qk=head_dim,
                            head_dim_v=head_dim if head_dim_v is None else head_dim_v,
                            num_q_heads=num_q_heads,
                            num_kv_heads=num_kv_heads,
                            batch_size=batch_size,
                            num_tokens=batch_size * length,
                            max_len_extend=length,
                            num_kv_indices=batch_size * max_context if with_pool else 0,
                            sliding_window=window,
                            **flags,
                        )
                        found.setdefault(problem.key(), problem)
        return list(found.values())


def _as_tuple(value: Union[int, Iterable[int]]) -> Tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
