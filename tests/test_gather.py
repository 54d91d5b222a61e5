"""Prefixes that are gathered once a call (``gather``), ahead by a kernel of their own or beside the walk over new
tokens: the copies, the order in which they are made, and who may ask for them."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bars
import pytest
import torch
from cases import FP8, make_case
from modes import GPU

import extend_attn
from extend_attn import attention, calls
from extend_attn.bench.tuning.posed import pose
from extend_attn.plan import DeviceSpec, Plan, Tile, illegal, select
from extend_attn.plan.legality_hopper_tiled import GATHERED_BYTES_MAX, gathered_bytes
from extend_attn.problem import Problem

H100 = replace(DeviceSpec.preset("h100"), triton="3.6.0")
CHUNK = Problem("bfloat16", 256, 256, 8, 4, 4, 4096, 1024, 4 * 4096)
GATHER = Plan("hopper_tiled", Tile(128, 64, 8, 1), gather="ahead", pdl=True)
FP8_CHUNK = replace(CHUNK, kv_dtype="float8_e4m3fn")
LATENT = dict(tile=Tile(64, 64, 8, 1))
CPU = torch.device("cpu")

AHEAD, BESIDE = GPU["hopper_tiled_gather"], GPU["hopper_tiled_beside"]
# (new tokens, prefix): around tiles, with a neighbour's poisoned rows behind every end
UGLY = [
    (1, 129),
    (63, 64),
    (64, 63),
    (65, 0),
    (127, 1),
    (128, 128),
    (129, 500),
    (300, 65),
    (0, 70),
    (513, 1000),
    (0, 0),
]

gpu = pytest.mark.gpu
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
not_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")


def gathered(inputs, problem: Problem):
    """(keys, values) after the kernel ran in the interpreter, NaN where it did not write."""
    from extend_attn.kernels.launch_gather import gather_before, gather_tensors, prefix_rows

    plan = replace(GATHER, pdl=False)
    kernel = gather_before(plan, inputs, problem, multiprocessors=1)
    wanted = prefix_rows(problem, inputs.q.dtype)
    rows = [torch.full((one.elements,), math.nan, dtype=one.dtype) for one in wanted]
    kernel.function[kernel.grid](*gather_tensors(inputs, *rows), *kernel.numbers, **kernel.constants)
    dims = problem.head_dim_qk, problem.head_dim_v
    return [t.view(-1, problem.num_kv_heads, dim) for t, dim in zip(rows, dims)]


@not_gpu
@pytest.mark.parametrize("kv_dtype", [torch.float16, *FP8], ids=str)
@pytest.mark.parametrize("dim, dim_v, index", [(256, 256, "int64"), (96, 64, "int32"), (48, 80, "int64")])
def test_rows_of_the_sequences_and_no_others(monkeypatch, dim, dim_v, index, kv_dtype):
    """Every code of the pool's type, more blocks than programs, a list that begins late and ends early."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    name = str(kv_dtype).removeprefix("torch.")
    problem = Problem("float16", dim, dim_v, 4, 2, 3, 12, 4, 3 * 70, kv_dtype=name, index_dtype=index)
    one = pose(problem, CPU, num_sets=1).sets[0]
    if kv_dtype.itemsize == 1:
        for pool in (one.k_pool, one.v_pool):
            codes = pool.view(torch.uint8)
            codes.copy_(torch.arange(codes.numel()).remainder(256).to(torch.uint8).view(codes.shape))
    one = one._replace(kv_indptr=torch.tensor([5, 75, 75, 200], dtype=torch.int32))
    for rows, pool in zip(gathered(one, problem), (one.k_pool, one.v_pool)):
        wanted = torch.full(rows.shape, math.nan, dtype=torch.float16)
        wanted[5:200] = pool[one.kv_indices[5:200].long()].to(torch.float16)
        torch.testing.assert_close(rows, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "problem, changes, said",
    [
        (replace(CHUNK, num_kv_indices=0), {}, "no prefix"),
        (replace(CHUNK, unified=True, num_kv_indices=4 * 5120), {}, "new tokens too"),
        (replace(CHUNK, sliding_window=1024), {}, "no token sees"),
        (replace(CHUNK, custom_mask=True, mask_prefix=True), {}, "no token sees"),
        (replace(CHUNK, num_kv_indices=1 << 19), {}, "bytes of prefixes"),
        (replace(CHUNK, head_dim_qk=576, head_dim_v=512, num_kv_heads=1, v_aliases_k_pool=True), LATENT, "latent"),
        (CHUNK, dict(gather="beside"), "copied ahead"),
        (FP8_CHUNK, dict(gather="beside", split_kv=2), "split_kv 2"),
        (replace(FP8_CHUNK, custom_mask=True), dict(gather="beside"), "mask"),
        (replace(FP8_CHUNK, batch_size=129), dict(gather="beside"), "129 sequences"),
        (replace(FP8_CHUNK, head_dim_qk=512, head_dim_v=512), dict(gather="beside"), "registers"),
        (CHUNK, dict(family="tiled", tile=Tile(64, 64)), "only hopper_tiled"),
        (CHUNK, dict(family="hopper_packed", tile=Tile(64, 64)), "packed families"),
    ],
)
def test_where_it_cannot_be(problem, changes, said):
    reason = illegal(problem, replace(GATHER, pdl=False, **changes), H100)
    assert reason is not None and reason.startswith("gather: ") and said in reason


def test_bytes():
    assert gathered_bytes(CHUNK) == 4 * 4096 * 4 * 512 * 2
    assert gathered_bytes(replace(CHUNK, num_kv_indices=1 << 18)) == GATHERED_BYTES_MAX
    assert illegal(CHUNK, GATHER, H100) is None
    assert illegal(replace(CHUNK, num_kv_indices=1 << 18), GATHER, H100) is None


def test_a_wide_fp8_pool_is_converted_ahead():
    """In the kernel its codes would spill."""
    wide = replace(CHUNK, head_dim_qk=512, head_dim_v=512, num_kv_heads=2, kv_dtype="float8_e4m3fn")
    plan = select(wide, H100, plan={"family": "hopper_tiled", "gather": "ahead"})
    assert illegal(wide, plan, H100) is None
    assert "spills" in str(illegal(wide, replace(plan, gather=""), H100))


def source_of(name: str):
    """A function of the kernel that gathers beside the walk, over PyTorch: Gluon is not imported beside Triton's
    interpreter."""
    path = Path(extend_attn.__file__).parent / "kernels" / "hopper" / "tiled_copies.py"
    (found,) = [one for one in ast.parse(path.read_text()).body if getattr(one, "name", "") == name]
    found.decorator_list = []
    language = SimpleNamespace(
        max=lambda t, axis: t.max(),
        sum=lambda t, axis: t.sum(),
        minimum=lambda t, most: t.clamp(max=int(most)),
        where=lambda condition, a, b: a if condition else b,
        int32=torch.int32,
    )
    scope = {"gl": language, "HEADER": 32}
    exec(compile(ast.Module([found], []), str(path), "exec"), scope)
    return scope[name]


@pytest.mark.parametrize(
    "tiles", [[5], [0, 3], [4, 4, 4], [1, 0, 7, 2, 0, 0, 3], [0] * 9 + [130] + [2] * 100], ids=lambda t: f"{len(t)}"
)
def test_units_go_by_depth_and_each_is_taken_once(tiles):
    """All tiles from the prefixes' ends down, sequences in turns: as the walk asks for them."""
    padded = torch.zeros(128, dtype=torch.int32)
    padded[: len(tiles)] = torch.tensor(tiles)
    ids = torch.arange(128)
    level_of = source_of("level_of")
    found = [tuple(map(int, level_of(rank, len(tiles), padded, ids))) for rank in range(sum(tiles))]
    assert found == [(level, b) for level in range(max(tiles)) for b, n in enumerate(tiles) if level < n]


def test_no_two_units_share_a_word():
    """Prefixes that begin and end inside a tile of the list, some of them empty."""
    word_of = source_of("word_of")
    for block_n, heads in ((64, 1), (128, 3)):
        shape = SimpleNamespace(BLOCK_N=block_n, NUM_HEADS=4 * heads, GROUP=4)
        start, words, lengths = 5, [], [1, 63, 0, 0, 64, 65, 200, 1, 1, 1, 127, 300, 0, 7]
        for sequence, length in enumerate(lengths):
            tiles = range(-(-length // block_n))
            words += [word_of(sequence, start, tile, head, shape) for tile in tiles for head in range(heads)]
            start += length
        assert len(set(words)) == len(words) and min(words) >= 32
        assert max(words) < 32 + (start // block_n + len(lengths) + 1) * heads  # what launch_tiled.py allots


def on_gpu(**spec):
    return make_case(**{"dtype": torch.bfloat16, "device": "cuda", "lengths": UGLY, "heads": (4, 2), **spec})


@gpu
@hopper
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kv_dtype", [None, *FP8], ids=str)
@pytest.mark.parametrize("dim, dim_v", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (512, 512)])
def test_head_dims(dim, dim_v, kv_dtype, splits):
    lengths = UGLY if splits == 1 else [(1, 129), (65, 700), (0, 70), (129, 0), (300, 1500)]
    scales = {} if kv_dtype is None else {"kv_dtype": kv_dtype, "k_scale": 0.5, "v_scale": 2.0}
    case = on_gpu(dim=dim, dim_v=dim_v, lengths=lengths, **scales)
    AHEAD.check(case, plan={**AHEAD.plan, "split_kv": splits})
    if splits == 1 and kv_dtype is not None and dim <= 256:
        BESIDE.check(case)


RULES = [
    dict(dtype=torch.float16),
    dict(dtype=torch.float16, kv_dtype=torch.float8_e5m2),
    dict(out_dtype=torch.float32, sinks=torch.float32),
    dict(causal=False, logit_cap=20.0),
    dict(temperature_len=100, sm_scale=-0.1),
    dict(layout="plain", pool_layout="strided", index_dtype=torch.int32),
    dict(lead=5, max_len_extend=2000),
    dict(heads=(12, 2), lengths=[(70, 1000)] * 40),
    dict(heads=(8, 8), lengths=[(30 + n, n * n % 400) for n in range(128)]),
    dict(heads=(16, 8), lengths=[(700, 5000), (300, 0), (600, 4000), (900, 129)]),
]
MASKS = [dict(mask="tree"), dict(mask="tree", kv_dtype=torch.float8_e4m3fn)]


@gpu
@hopper
@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("spec", [*RULES, *MASKS], ids=str)
def test_rules_ahead(spec, gqa):
    AHEAD.check(on_gpu(dim=128, **spec), plan={**AHEAD.plan, "pack_gqa": gqa})


@gpu
@hopper
@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("spec", RULES, ids=str)
def test_rules_beside(spec, gqa):
    case = on_gpu(**{"dim": 256, "kv_dtype": torch.float8_e4m3fn, "k_scale": 0.5, "v_scale": 2.0, **spec})
    BESIDE.check(case, plan={**BESIDE.plan, "pack_gqa": gqa})


@gpu
@hopper
def test_beside_in_any_order():
    """One stream's words serve launches of other lengths, tiles, head dims and programs, one after the other."""
    cases = [
        on_gpu(dim=dim, kv_dtype=torch.float8_e4m3fn, lengths=lengths, seed=seed)
        for seed, (dim, lengths) in enumerate(
            [(256, UGLY), (64, [(130, 3000)] * 3), (256, [(1, 5)]), (128, [(300, 9000), (5, 64)]), (64, [(64, 0)])]
        )
    ]
    for turn in range(12):
        BESIDE.check(cases[turn * 7 % len(cases)])


@gpu
@hopper
@pytest.mark.parametrize(
    "mode, spec",
    [
        (AHEAD, dict(dim=128)),
        (AHEAD, dict(dim=128, kv_dtype=torch.float8_e4m3fn)),
        (BESIDE, dict(dim=256, kv_dtype=torch.float8_e4m3fn)),
    ],
    ids=["ahead", "ahead-fp8", "beside"],
)
def test_repeats(mode, spec, monkeypatch):
    """A repeated call is launched from addresses, its own memory's among them, also when that has grown since."""
    launching = attention._launching()
    dispatched = []
    launch = launching.launch
    monkeypatch.setattr(launching, "launch", lambda *args: dispatched.append(args) or launch(*args))
    calls.forget()
    few, many = on_gpu(**spec), on_gpu(**spec, lengths=[(130, 3000)] * 5)
    wanted = {}
    for turn in range(75):
        for one in (few, many):
            out, buffer = one.out()
            extend_attn.extend_attention_fwd(o_extend=out, **one.kwargs, plan=mode.plan)
            if turn == 0:
                bars.assert_right(one, out, buffer, None)
                wanted[id(one)] = out.nan_to_num()
            assert torch.equal(out.nan_to_num(), wanted[id(one)])
        if turn == 2:
            dispatched.clear()
    assert not dispatched
    calls.forget()


@pytest.mark.parametrize(
    "changes, gather",
    [
        (dict(kv_dtype="float8_e4m3fn"), "beside"),
        (dict(kv_dtype="float8_e4m3fn", max_len_extend=512, num_tokens=2048), "beside"),  # eight blocks read each key
        (dict(kv_dtype="float8_e4m3fn", max_len_extend=512, num_tokens=512, batch_size=1), "ahead"),  # in parts
        (dict(kv_dtype="float8_e4m3fn", max_len_extend=256, num_tokens=1024), ""),  # four
        (dict(kv_dtype="float8_e4m3fn", num_kv_indices=1 << 17), ""),  # half a GiB
        (dict(kv_dtype="float8_e4m3fn", sliding_window=1024), ""),
        (dict(kv_dtype="float8_e4m3fn", custom_mask=True), "ahead"),
        (dict(kv_dtype="float8_e4m3fn", head_dim_qk=128, head_dim_v=128, num_q_heads=16), "ahead"),
        (dict(), ""),
        (dict(head_dim_qk=128, head_dim_v=128, num_q_heads=16), "ahead"),
        (dict(head_dim_qk=128, head_dim_v=128), ""),
        (dict(head_dim_qk=64, head_dim_v=64, num_q_heads=16), ""),
        (dict(head_dim_qk=512, head_dim_v=512, num_q_heads=16), "ahead"),
    ],
)
def test_where_it_is_the_default(changes, gather):
    plan = select(replace(CHUNK, **changes), H100, plan="heuristic")
    assert (plan.family, plan.gather) == ("hopper_tiled", gather)
