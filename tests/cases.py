"""Inputs as engines make them, and worse: one builder for every test.

``make_case(...)`` scatters a batch over a KV pool with its slots in random order. Whatever a call must not read is
poison: unused slots, rows of q, k and v outside ``qo_indptr`` and gaps of the layout hold NaN, index arrays go on past
their end and point at a poisoned slot, masks go on with random bytes. Outputs start as NaN, padding included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Dict, List, Optional, Sequence, Tuple

import oracle
import torch

# Lengths that break kernels: (new tokens, prefix) of each sequence of a batch.
TINY = [(1, 0), (9, 35), (0, 9), (3, 52)]  # for the interpreter, which takes milliseconds a tile
SPLIT = [(1, 0), (3, 300), (0, 150), (5, 135)]  # the same where key lists are split, which short ones never are
SMALL = [(1, 0), (17, 33), (0, 9), (33, 16), (16, 50)]
LARGE = [(1, 1023), (63, 64), (0, 65), (64, 0), (65, 1000), (1000, 63), (1023, 1), (0, 0)]
ONE_SHAPES = [(1, 0), (1, 1), (63, 64), (64, 63), (65, 65)]
ONE_SHAPES_LARGE = [(1000, 0), (1, 1000), (1023, 1023), (64, 1000), (1000, 65)]
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BEYOND = 3  # what "longer than used" means here: rows, indices and mask bytes past the end


@dataclass
class Spec:
    """What a case is. lengths: (E_b, P_b) of each sequence."""

    lengths: Sequence[Tuple[int, int]] = field(default_factory=lambda: list(SMALL))
    heads: Tuple[int, int] = (4, 2)  # query heads, KV heads
    dim: int = 32
    dim_v: Optional[int] = None
    dtype: torch.dtype = torch.float32
    kv_dtype: Optional[torch.dtype] = None
    out_dtype: Optional[torch.dtype] = None
    device: str = "cpu"
    unified: bool = False
    # arrays
    index_dtype: torch.dtype = torch.int64  # kv_indices
    indptr_dtype: torch.dtype = torch.int32
    layout: str = "qkv"  # plain | qkv (slices of one fused buffer) | odd (row strides that are aligned to nothing)
    pool_layout: str = "plain"  # plain | strided (k and v interleaved)
    page: int = 1  # slots come in runs of so many, but for every third sequence and two keys of long others
    lead: int = 0  # rows, indices and mask bytes before the first sequence
    beyond: int = BEYOND
    alias: bool = False  # MLA: V is the first dim_v columns of K, in the pool and in the new tokens
    extend_from_pool: bool = False  # k_extend, v_extend equal what the unified pool would hold
    # rules
    causal: bool = True
    mask: Optional[str] = None  # tree | random | causal | future | nothing
    mask_dtype: torch.dtype = torch.bool
    mask_prefix: bool = False
    window: int = -1
    cut: Optional[Sequence[int]] = None  # w_b (of the first sequences, if there are more than the batch has)
    tree_positions: bool = False  # q_positions: a tree's depth
    sinks: Optional[torch.dtype] = None
    logit_cap: float = 0.0
    temperature_len: int = -1
    sm_scale: Optional[float] = None
    k_scale: Optional[float] = 1.0
    v_scale: Optional[float] = 1.0
    max_len_extend: Optional[int] = None
    flat: bool = False  # values of mean 0.1 and deviation 0.2: every key counts alike
    seed: int = 0

    def __post_init__(self):
        self.dim_v = self.dim if self.dim_v is None else self.dim_v
        self.kv_dtype = self.kv_dtype or self.dtype
        self.out_dtype = self.out_dtype or self.dtype


@dataclass
class Case:
    """kwargs: the function's arguments without its output. ``out()`` makes an output."""

    spec: Spec
    kwargs: Dict[str, Any]

    @cached_property
    def expected(self) -> oracle.Result:
        """The definition's answer."""
        return self._oracle(torch.float64)

    @cached_property
    def in_fp32(self) -> oracle.Result:
        """The same computed in fp32: the yardstick of the accuracy bar."""
        return self._oracle(torch.float32)

    def _oracle(self, dtype: torch.dtype) -> oracle.Result:
        function = oracle.unified if self.spec.unified else oracle.extend
        return function(**self.kwargs, dtype=dtype)

    @property
    def tokens(self) -> int:
        return self.kwargs["q" if self.spec.unified else "q_extend"].shape[0]

    def out(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """(the output to pass, the poisoned buffer that it is a view of)."""
        spec = self.spec
        pad = {"plain": 0, "qkv": 16, "odd": 3}[spec.layout]
        shape = (self.tokens, spec.heads[0], spec.dim_v + pad)
        buffer = torch.full(shape, math.nan, dtype=spec.out_dtype, device=spec.device)
        return buffer[:, :, : spec.dim_v], buffer

    def with_(self, **kwargs) -> Case:
        """The same tensors with some arguments replaced."""
        return Case(self.spec, {**self.kwargs, **kwargs})


class _Builder:
    def __init__(self, spec: Spec):
        self.spec = spec
        self.device = torch.device(spec.device)
        self.random = torch.Generator(self.device).manual_seed(spec.seed)
        self.noise = torch.Generator(self.device).manual_seed(spec.seed + 1)  # for bytes that no call may read
        self.new = [e for e, _ in spec.lengths]
        self.prefix = [p for _, p in spec.lengths]
        self.cut = list(spec.cut)[: len(self.new)] if spec.cut is not None else [0] * len(self.new)

    def normal(self, *shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=self.random, device=self.device)
        return 0.1 + 0.2 * values if self.spec.flat else values

    def coins(self, *shape: int, generator: Optional[torch.Generator] = None) -> torch.Tensor:
        return torch.randint(0, 2, shape, generator=generator or self.random, device=self.device).bool()

    def garbage(self, *shape: int) -> torch.Tensor:
        return self.coins(*shape, generator=self.noise)

    def indptr(self, lengths: Sequence[int], dtype: torch.dtype, beyond: int = 0) -> torch.Tensor:
        ends = [self.spec.lead]
        for length in lengths:
            ends.append(ends[-1] + length)
        # what follows is no valid pointer: it goes down
        return torch.tensor(ends + [0] * beyond, dtype=dtype, device=self.device)

    def build(self) -> Case:
        spec = self.spec
        hq, hkv = spec.heads
        tokens = sum(self.new)
        q = self.normal(tokens, hq, spec.dim) * (1 if spec.flat else 2)
        # the logical keys and values of every sequence: prefix rows, then new rows
        prefix_k, prefix_v = self.pool_values(sum(self.prefix))
        new_k, new_v = self.new_values(tokens)
        kwargs = self.rules()
        scales = {"k_scale": spec.k_scale, "v_scale": spec.v_scale}
        common = {"qo_indptr": self.indptr(self.new, spec.indptr_dtype), "max_len_extend": self.bound(), **scales}
        if spec.unified:
            order = self.unified_order()
            both = torch.cat([prefix_k, new_k])[order], torch.cat([prefix_v, new_v])[order]
            pools, slots = self.pool(*both, [e + p for e, p in spec.lengths])
            kwargs.update(common, q=self.place([q])[0], prefix_lens=self.padded(self.prefix, spec.indptr_dtype))
            lengths = [e + p for e, p in spec.lengths]
            offsets = "window_start_pos"
        else:
            pools, slots = self.pool(prefix_k, prefix_v, self.prefix)
            if spec.alias:
                q_rows, k_rows = self.place([q, new_k])
                v_rows = k_rows[:, :, : spec.dim_v]
            else:
                q_rows, k_rows, v_rows = self.place([q, new_k, new_v])
            kwargs.update(common, q_extend=q_rows, k_extend=k_rows, v_extend=v_rows)
            kwargs["skip_prefix_custom_mask"] = not spec.mask_prefix
            lengths = self.prefix
            offsets = "window_kv_offsets"
        kwargs.update(zip(("k_buffer", "v_buffer"), pools))
        kwargs["kv_indices"] = slots
        kwargs["kv_indptr"] = self.indptr(lengths, spec.indptr_dtype, spec.beyond)
        kwargs[offsets] = None if spec.cut is None else self.padded(self.cut, spec.indptr_dtype)
        return Case(spec, kwargs)

    def bound(self) -> int:
        return max(self.new, default=0) if self.spec.max_len_extend is None else self.spec.max_len_extend

    def padded(self, values: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(list(values) + [-7] * self.spec.beyond, dtype=dtype, device=self.device)

    # --- keys and values -----------------------------------------------------------------------------------------

    def pool_values(self, rows: int) -> Tuple[torch.Tensor, torch.Tensor]:
        spec, hkv = self.spec, self.spec.heads[1]
        k = self.normal(rows, hkv, spec.dim).to(spec.kv_dtype)
        v = k[:, :, : spec.dim_v] if spec.alias else self.normal(rows, hkv, spec.dim_v).to(spec.kv_dtype)
        return k, v

    def new_values(self, rows: int) -> Tuple[torch.Tensor, torch.Tensor]:
        """In the pool's type where they lie in the pool; in the query's type otherwise."""
        spec = self.spec
        if spec.unified:
            return self.pool_values(rows)
        if spec.extend_from_pool:
            k, v = self.pool_values(rows)
            k, v = k.float() * (spec.k_scale or 1.0), v.float() * (spec.v_scale or 1.0)
        else:
            k = self.normal(rows, spec.heads[1], spec.dim)
            v = k[:, :, : spec.dim_v] if spec.alias else self.normal(rows, spec.heads[1], spec.dim_v)
        return k.to(spec.dtype), v.to(spec.dtype)

    def unified_order(self) -> torch.Tensor:
        """Rows of [all prefixes, all new tokens], sequence by sequence."""
        order: List[int] = []
        prefix_at, new_at = 0, sum(self.prefix)
        for new, prefix in self.spec.lengths:
            order += range(prefix_at, prefix_at + prefix)
            order += range(new_at, new_at + new)
            prefix_at, new_at = prefix_at + prefix, new_at + new
        return torch.tensor(order, dtype=torch.long, device=self.device)

    def place(self, parts: List[torch.Tensor]) -> List[torch.Tensor]:
        """Rows behind ``lead`` poisoned rows and before ``beyond`` of them, in the spec's layout."""
        spec = self.spec
        tokens = spec.lead + parts[0].shape[0] + spec.beyond
        gap = {"plain": 0, "qkv": 0, "odd": 1}[spec.layout]
        widths = [part.shape[1] * part.shape[2] + gap for part in parts]
        if spec.layout == "plain":
            flat = [torch.full((tokens, width), math.nan, dtype=spec.dtype, device=self.device) for width in widths]
        else:
            flat = list(
                torch.full((tokens, sum(widths)), math.nan, dtype=spec.dtype, device=self.device).split(widths, 1)
            )
        views = []
        for part, rows in zip(parts, flat):
            heads, dim = part.shape[1:]
            view = rows[:, : heads * dim].unflatten(1, (heads, dim))
            view[spec.lead : spec.lead + part.shape[0]] = part.to(spec.dtype)
            views.append(view)
        return views

    def pool(
        self, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int]
    ) -> Tuple[Tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Scatter rows, so many a sequence, over pools; returns the pools and ``kv_indices``."""
        spec = self.spec
        slots, spare, size = self.slots(lengths)
        if spec.pool_layout == "strided":
            both = self.poison(size, spec.heads[1], 2, max(spec.dim, spec.dim_v))
            k_pool, v_pool = both[:, :, 0, : spec.dim], both[:, :, 1, : spec.dim_v]
        else:
            k_pool = self.poison(size, spec.heads[1], spec.dim)
            v_pool = k_pool[:, :, : spec.dim_v] if spec.alias else self.poison(size, spec.heads[1], spec.dim_v)
        put(k_pool, slots, k)
        if not spec.alias:
            put(v_pool, slots, v)
        return (k_pool, v_pool), torch.cat([spare.expand(spec.lead), slots, spare.expand(spec.beyond)]).to(
            spec.index_dtype
        )

    def slots(self, lengths: Sequence[int]) -> Tuple[torch.Tensor, torch.Tensor, int]:
        """(slots of all sequences' rows in order, a slot of nobody's, how many slots the pool has)."""
        page, used = self.spec.page, sum(lengths)
        if page == 1:
            size = used + used // 4 + 5
            order = torch.randperm(size, generator=self.random, device=self.device)
            return order[:used], order[used], size
        counts = [-(-length // page) for length in lengths]
        pages = torch.randperm(sum(counts) + 1, generator=self.random, device=self.device)
        order = pages[:, None] * page + torch.arange(page, device=self.device)
        owned = []
        for b, (length, some) in enumerate(zip(lengths, order[:-1].split(counts))):
            own = some.flatten()[:length]
            if b % 3 == 2:
                own = own[torch.randperm(length, generator=self.random, device=self.device)]
            elif length > 200:
                own = own.clone()
                own[100:102] = own[100:102].flip(0)
            owned.append(own)
        return torch.cat(owned), order[-1, 0], len(pages) * page

    def poison(self, *shape: int) -> torch.Tensor:
        return poisoned(shape, self.spec.kv_dtype, self.device)

    # --- rules ---------------------------------------------------------------------------------------------------

    def rules(self) -> Dict[str, Any]:
        spec = self.spec
        trees = [self.tree(new) for new in self.new]
        custom_mask, mask_indptr = self.masks(trees)
        sinks = None if spec.sinks is None else (self.normal(spec.heads[0]) * 2).to(spec.sinks)
        return {
            "custom_mask": custom_mask,
            "is_causal": spec.causal,
            "mask_indptr": mask_indptr,
            "sm_scale": spec.sm_scale,
            "logit_cap": spec.logit_cap,
            "sliding_window_size": spec.window,
            "sinks": sinks,
            "xai_temperature_len": spec.temperature_len,
            "q_positions": self.positions(trees) if spec.tree_positions else None,
        }

    def tree(self, nodes: int) -> Tuple[torch.Tensor, List[int]]:
        """A random draft tree in breadth-first order: ancestor-or-self ``[nodes, nodes]`` and each node's depth."""
        ancestors = torch.zeros(nodes, nodes, dtype=torch.bool)
        depth = [0] * nodes
        pick = torch.Generator().manual_seed(self.spec.seed + nodes)
        if self.spec.mask != "tree" and not self.spec.tree_positions:
            return ancestors.to(self.device), depth
        parents = [int(torch.randint(max(0, m - 3), m, (1,), generator=pick)) for m in range(1, nodes)]
        for node, parent in enumerate(sorted(parents), start=1):
            ancestors[node] = ancestors[parent]
            ancestors[node, parent] = True
            depth[node] = depth[parent] + 1
        ancestors.fill_diagonal_(True)
        return ancestors.to(self.device), depth

    def positions(self, trees) -> torch.Tensor:
        spec = self.spec
        values = [-1_000_000] * spec.lead
        for (_, depth), prefix, cut in zip(trees, self.prefix, self.cut):
            first = prefix + (cut if spec.window > 0 else 0)
            values += [first + d for d in depth]
        return torch.tensor(values + [1_000_000] * spec.beyond, dtype=torch.int32, device=self.device)

    def masks(self, trees) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
        spec = self.spec
        if spec.mask is None:
            return None, None
        parts: List[torch.Tensor] = [self.garbage(spec.lead)]
        starts, at = [], spec.lead
        for (new, prefix), (ancestors, _), cut in zip(spec.lengths, trees, self.cut):
            skipped = cut if spec.window > 0 and not spec.unified else 0
            flat = torch.cat([self.garbage(new, skipped), self.mask_of(new, prefix, ancestors)], dim=1).flatten()
            gap = self.garbage(2)
            starts.append(at)
            parts += [flat, gap]
            at += flat.numel() + 2
        parts.append(self.garbage(spec.beyond))
        flat = torch.cat(parts).to(spec.mask_dtype)
        return flat, torch.tensor(starts + [at] + [0] * spec.beyond, dtype=torch.int64, device=self.device)

    def mask_of(self, new: int, prefix: int, ancestors: torch.Tensor) -> torch.Tensor:
        """Bool ``[new, prefix + new]``."""
        kind = self.spec.mask
        before = self.coins(new, prefix)
        if kind == "tree":
            return torch.cat([before, ancestors], dim=1)
        if kind == "causal":
            after = torch.ones(new, new, dtype=torch.bool, device=self.device).tril()
        elif kind == "future":  # mostly what a causal kernel would cut away
            after = self.coins(new, new) | torch.ones(new, new, dtype=torch.bool, device=self.device).triu()
        elif kind == "nothing":
            before, after = torch.zeros_like(before), torch.zeros(new, new, dtype=torch.bool, device=self.device)
        else:
            after = self.coins(new, new)
        return torch.cat([before, after], dim=1)


def poisoned(shape: Sequence[int], dtype: torch.dtype, device) -> torch.Tensor:
    """NaN everywhere, in any floating type."""
    if dtype in FP8:
        return torch.full(tuple(shape), 0x7F, dtype=torch.uint8, device=device).view(dtype)
    return torch.full(tuple(shape), math.nan, dtype=dtype, device=device)


def put(pool: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """``pool[slots] = rows``, also where indexing is not implemented for the type."""
    if pool.dtype in FP8:
        pool, rows = pool.view(torch.uint8), rows.view(torch.uint8)
    pool[slots] = rows


def make_case(**spec) -> Case:
    """A case of ``Spec(**spec)``."""
    return _Builder(Spec(**spec)).build()


def rebuild(case: Case, **changes) -> Case:
    """The case of the same spec (and the same random numbers) with some fields changed."""
    return _Builder(replace(case.spec, **changes)).build()
