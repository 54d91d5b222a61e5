"""Prefixes that a kernel of their own gathers ahead (``gather``): the copies, and who may ask for them."""

from __future__ import annotations

import math
from dataclasses import replace

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
GATHER = Plan("hopper_tiled", Tile(128, 64, 8, 1), gather=True, pdl=True)
LATENT = dict(tile=Tile(64, 64, 8, 1))
CPU = torch.device("cpu")

MODE = GPU["hopper_tiled_gather"]
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
    from extend_attn.kernels.launch_gather import gather_before, gather_tensors

    plan = replace(GATHER, pdl=False)
    kernel, wanted = gather_before(plan, inputs, problem, multiprocessors=1)
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
    plan = select(wide, H100, plan={"family": "hopper_tiled", "gather": True})
    assert illegal(wide, plan, H100) is None
    assert "spills" in str(illegal(wide, replace(plan, gather=False), H100))


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
    MODE.check(on_gpu(dim=dim, dim_v=dim_v, lengths=lengths, **scales), plan={**MODE.plan, "split_kv": splits})


@gpu
@hopper
@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        dict(dtype=torch.float16),
        dict(dtype=torch.float16, kv_dtype=torch.float8_e5m2),
        dict(out_dtype=torch.float32, sinks=torch.float32),
        dict(causal=False, logit_cap=20.0),
        dict(temperature_len=100, sm_scale=-0.1),
        dict(mask="tree"),
        dict(mask="tree", kv_dtype=torch.float8_e4m3fn),
        dict(layout="plain", pool_layout="strided", index_dtype=torch.int32),
        dict(lead=5, max_len_extend=2000),
        dict(heads=(12, 2), lengths=[(70, 1000)] * 40),
    ],
    ids=str,
)
def test_rules(spec, gqa):
    MODE.check(on_gpu(dim=128, **spec), plan={**MODE.plan, "pack_gqa": gqa})


@gpu
@hopper
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn], ids=str)
def test_repeats(kv_dtype, monkeypatch):
    """A repeated call is launched from addresses, its own memory's among them, also when that has grown since."""
    launching = attention._launching()
    dispatched = []
    launch = launching.launch
    monkeypatch.setattr(launching, "launch", lambda *args: dispatched.append(args) or launch(*args))
    calls.forget()
    spec = {"dim": 128} if kv_dtype is None else {"dim": 128, "kv_dtype": kv_dtype}
    few, many = on_gpu(**spec), on_gpu(**spec, lengths=[(130, 3000)] * 5)
    wanted = {}
    for turn in range(60):
        for one in (few, many):
            out, buffer = one.out()
            extend_attn.extend_attention_fwd(o_extend=out, **one.kwargs, plan=MODE.plan)
            if turn == 0:
                bars.assert_right(one, out, buffer, None)
                wanted[id(one)] = out.nan_to_num()
            assert torch.equal(out.nan_to_num(), wanted[id(one)])
        if turn == 2:
            dispatched.clear()
    assert not dispatched
    calls.forget()


@pytest.mark.parametrize(
    "changes, gathers",
    [
        (dict(kv_dtype="float8_e4m3fn"), True),
        (dict(kv_dtype="float8_e4m3fn", max_len_extend=256, num_tokens=1024), False),  # four blocks read each key
        (dict(kv_dtype="float8_e4m3fn", num_kv_indices=1 << 17), False),  # half a GiB
        (dict(kv_dtype="float8_e4m3fn", sliding_window=1024), False),
        (dict(), False),
        (dict(head_dim_qk=128, head_dim_v=128, num_q_heads=16), True),
        (dict(head_dim_qk=128, head_dim_v=128), False),
        (dict(head_dim_qk=64, head_dim_v=64, num_q_heads=16), False),
        (dict(head_dim_qk=512, head_dim_v=512, num_q_heads=16), True),
    ],
)
def test_where_it_is_the_default(changes, gathers):
    plan = select(replace(CHUNK, **changes), H100, plan="heuristic")
    assert (plan.family, plan.gather) == ("hopper_tiled", gathers)
