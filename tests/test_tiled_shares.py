"""How hopper_tiled cuts few items (kernels/hopper/tiled_shares.py): its source, run program by program on numpy."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

SOURCE = Path(__file__).resolve().parents[1] / "python/extend_attn/kernels/hopper/tiled_shares.py"
SPLITS, PROGRAMS, PATIENCE = 6, 132, 7


class Array(np.ndarray):
    """What the source calls a tensor; a scalar is one of no dimensions."""

    def to(self, kind):
        return self.astype(kind)


def array(x):
    return np.asarray(x).view(Array)


class Memory:
    """A pointer."""

    def __init__(self, values, at=0):
        self.values, self.at = values, at

    def __add__(self, offset):
        return Memory(self.values, self.at + offset)


def load(pointer, mask, other):
    at = np.where(mask, pointer.at, 0)
    return array(np.where(mask, np.asarray(pointer.values)[at], other))


def module(program: int) -> dict:
    """The source's functions as that program runs them."""
    gl = SimpleNamespace(
        int32=np.int32, tensor=None, load=load, to_tensor=array,
        constexpr=lambda x: x,
        BlockedLayout=lambda *a: None, num_warps=lambda: 1,
        arange=lambda a, b, layout: array(np.arange(a, b)),
        where=lambda c, a, b: array(np.where(c, a, b)),
        sum=lambda x, axis: array(np.sum(np.asarray(x), axis)), max=lambda x, axis: array(np.max(np.asarray(x), axis)),
        maximum=lambda a, b: array(np.maximum(a, b)), minimum=lambda a, b: array(np.minimum(a, b)),
        cdiv=lambda a, b: -(-a // b), program_id=lambda axis: array(program), num_programs=lambda axis: array(PROGRAMS),
    )  # fmt: skip

    def struct(cls):
        names = list(cls.__annotations__)
        return lambda *values: SimpleNamespace(**dict(zip(names, values)))

    names = {
        "gl": gl, "gluon": SimpleNamespace(jit=lambda f: f), "struct": struct, "ROW_BLOCKS_MAX": 128, "MIN_TILES": 5,
        "Part": lambda *v: SimpleNamespace(**dict(zip(("begin", "end", "number", "parts", "patience"), v))),
    }  # fmt: skip
    exec(re.sub(r"^from .*$", "", SOURCE.read_text(), flags=re.M), names)
    return names


def parts_of(lengths, heads, tokens=128, block_n=64, causal=True, max_len=None, splits=SPLITS):
    """{(block, head): [(number, parts, begin, end, program)]} of all programs, and the longest program's tiles."""
    new, prefixes = [e for e, _ in lengths], [p for _, p in lengths]
    c = SimpleNamespace(TOKENS=tokens, BLOCK_N=block_n, CAUSAL=causal, HAS_POOL=any(prefixes), UNIFIED=False)
    row_blocks = -(-(max_len or max(new)) // tokens)
    call = SimpleNamespace(
        batch_size=array(len(lengths)), row_blocks=array(row_blocks), splits=array(splits), patience=array(PATIENCE),
        qo_indptr=Memory(np.cumsum([0, *new])), kv_indptr=Memory(np.cumsum([0, *prefixes])),
    )  # fmt: skip
    assert row_blocks * len(lengths) * heads <= PROGRAMS
    found, longest = {}, 0
    for program in range(PROGRAMS):
        source = module(program)
        shares, done, waits = source["cut"](heads, call, c), 0, set()
        for _ in range(1000):
            block, head, part, there, shares = source["next_part"](shares, heads, call, c)
            if not there:
                break
            one = tuple(int(x) for x in (part.number, part.parts, part.begin, part.end))
            found.setdefault((int(block), int(head)), []).append((*one, program))
            done += one[3] - one[2]
            waits.add(int(part.patience))
        else:
            raise AssertionError("a program without end")
        assert waits <= {0} or len(waits) == 1 and program < PROGRAMS
        longest = max(longest, done)
    return found, longest


def tiles_of(lengths, block, tokens=128, block_n=64, causal=True, max_len=None):
    row_blocks = -(-(max_len or max(e for e, _ in lengths)) // tokens)
    new, prefix = lengths[block // row_blocks]
    first = block % row_blocks * tokens
    keys = min(first + tokens, new) if causal else new
    return -(-keys // block_n) + -(-prefix // block_n) if first < new else 0


CASES = [
    (dict(lengths=[(1000, 0)], heads=8), 6),
    (dict(lengths=[(512, 8192)], heads=8), 34),
    (dict(lengths=[(2048, 16384)], heads=8), 273),
    (dict(lengths=[(128, 2048)] * 16, heads=8), 34),
    (dict(lengths=[(1, 129), (65, 700), (0, 70), (129, 0), (100, 1), (30, 1500)], heads=4), 6),
    (dict(lengths=[(1, 0)], heads=1), 1),
    (dict(lengths=[(0, 5000), (1, 100000)], heads=1), 313),
    (dict(lengths=[(300, 5000), (0, 0), (7, 64)], heads=3, max_len=1000), 16),
    (dict(lengths=[(1000, 0)], heads=8, causal=False), 8),
    (dict(lengths=[(2000, 4000)], heads=2, tokens=64), 41),
]


@pytest.mark.parametrize("spec, most", CASES, ids=str)
def test_every_key_of_every_item_is_in_one_part(spec, most):
    spec = dict(spec)
    found, longest = parts_of(**spec)
    heads = spec.pop("heads")
    lengths = spec["lengths"]
    blocks = len(lengths) * -(-(spec.get("max_len") or max(e for e, _ in lengths)) // spec.get("tokens", 128))
    wanted = {(b, h) for b in range(blocks) for h in range(heads) if tiles_of(block=b, **spec)}
    assert set(found) == wanted
    for (block, _), parts in found.items():
        parts = sorted(parts)
        assert [p[0] for p in parts] == list(range(len(parts))) and {p[1] for p in parts} == {len(parts)}, parts
        assert len(parts) <= SPLITS
        ends = [0, *(p[3] for p in parts)]
        assert [p[2] for p in parts] == ends[:-1] and ends[-1] == tiles_of(block=block, **spec), parts
    assert longest <= most, longest
