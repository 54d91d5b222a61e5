"""Offsets past 2^31: every tensor that can be that large, with the rows that are used at its far end."""

from __future__ import annotations

import fcntl
import os
import tempfile

import pytest
import torch
from bars import assert_accurate, assert_lse
from cases import Case, make_case, put
from modes import GPU, KERNELS

import extend_attn

pytestmark = pytest.mark.gpu

PAST = 2**31
LENGTHS = [(65, 100), (3, 700)]
DIM, HEADS = 128, (4, 2)


@pytest.fixture(autouse=True)
def alone():
    """One of these tests at a time, whatever process runs it: each takes up to 30 GiB."""
    with open(os.path.join(tempfile.gettempdir(), "extend_attn_large_tests.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _require_memory()
        yield
        torch.cuda.empty_cache()


def _require_memory():
    free, _ = torch.cuda.mem_get_info()
    if free < 40 << 30:
        pytest.skip(f"needs 40 GiB of free GPU memory, {free >> 30} are")


def _case(**spec) -> Case:
    return make_case(
        lengths=LENGTHS, dim=DIM, heads=HEADS, dtype=torch.bfloat16, device="cuda", layout="plain", beyond=0, **spec
    )


def _check(case: Case, far: Case, kernel: str, rows: slice = slice(None)) -> None:
    """``far`` holds the case's contents somewhere else; its rows must be the case's."""
    hq = case.spec.heads[0]
    function, name = extend_attn.extend_attention_fwd, "o_extend"
    if case.spec.unified:
        function, name = extend_attn.extend_attention_fwd_unified, "o"
    query = far.kwargs["q" if case.spec.unified else "q_extend"]
    out = torch.empty(query.shape[0], hq, DIM, dtype=query.dtype, device="cuda")
    out[rows] = float("nan")
    lse = function(**{name: out}, **far.kwargs, return_lse=True, plan=KERNELS[kernel])
    assert_accurate(out[rows], case)
    assert_lse(lse[rows], case)


@pytest.mark.parametrize(
    "unified, index, kv_dtype",
    [(False, torch.int64, None), (True, torch.int32, None), (True, torch.int32, torch.float8_e4m3fn)],
    ids=["two_stage_int64", "unified_int32", "unified_int32_fp8"],
)
@pytest.mark.parametrize("kernel", ["tiled", "packed_split3"])
def test_pool(kernel, index, unified, kv_dtype):
    case = _case(unified=unified, kv_dtype=kv_dtype, index_dtype=index)
    used = case.kwargs["kv_indices"].long()
    slots = PAST // (HEADS[1] * DIM) + used.numel()  # per pool; both ends are used
    place = torch.arange(slots - used.numel(), slots, device="cuda")
    place[::3] = torch.arange(len(place[::3]), device="cuda")
    far = case.with_(kv_indices=place.to(index))
    for name in ("k_buffer", "v_buffer"):
        near = case.kwargs[name]
        pool = torch.empty(slots, HEADS[1], DIM, dtype=near.dtype, device="cuda")
        rows = near.view(torch.uint8)[used].view(near.dtype) if kv_dtype else near[used]
        put(pool, place, rows)
        far.kwargs[name] = pool
    _check(case, far, kernel)


@pytest.mark.parametrize("kernel", ["tiled", "packed_split3"])
def test_rows_of_queries_keys_and_outputs(kernel):
    case = _case()
    far = case.with_()
    tokens = case.tokens
    first = PAST // (HEADS[1] * DIM) + 5  # past 2^31 elements in k and v, twice that in q and o
    for name in ("q_extend", "k_extend", "v_extend"):
        near = case.kwargs[name]
        rows = torch.empty(first + tokens, *near.shape[1:], dtype=near.dtype, device="cuda")
        rows[first:] = near
        far.kwargs[name] = rows
    far.kwargs["qo_indptr"] = (case.kwargs["qo_indptr"].long() + first).int()
    _check(case, far, kernel, slice(first, first + tokens))


@pytest.mark.parametrize("kernel", ["tiled", "packed_split3"])
def test_masks_and_indices(kernel):
    case = _case(mask="random", mask_prefix=True, indptr_dtype=torch.int64, index_dtype=torch.int32)
    mask, slots = case.kwargs["custom_mask"], case.kwargs["kv_indices"]
    far = case.with_(custom_mask=torch.empty(PAST + mask.numel(), dtype=torch.bool, device="cuda"))
    far.kwargs["custom_mask"][PAST:] = mask
    far.kwargs["mask_indptr"] = case.kwargs["mask_indptr"] + PAST
    far.kwargs["kv_indices"] = torch.empty(PAST + slots.numel(), dtype=torch.int32, device="cuda")
    far.kwargs["kv_indices"][PAST:] = slots
    far.kwargs["kv_indptr"] = case.kwargs["kv_indptr"] + PAST
    _check(case, far, kernel)


def test_the_family_is_the_same_one_elsewhere():
    """The near case itself is right, so that a failure above is one of offsets."""
    for kernel in ("tiled", "packed_split3"):
        GPU[kernel].check(_case())
