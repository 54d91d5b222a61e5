"""The host parts of csrc/: checks, launch shapes, layout, headers. Built for an architecture that need not be there."""

from __future__ import annotations

import itertools

import pytest
from jit_env import needs_compilers

from extend_attn.jit import load_comm_module

BF16, FP32 = 1, 2
PUSH, PULL, TWO_SHOT, NORM = 1, 2, 3, 4
MIB = 1 << 20


@pytest.fixture(scope="module")
def module():
    needs_compilers()
    return load_comm_module(archs=("9.0",), dtypes=("bfloat16",))


@pytest.mark.parametrize("world", range(2, 9))
@pytest.mark.parametrize("push, pull", [(16, 16), (1000, 77), (MIB, 16 * MIB)])
def test_layout(module, world, push, pull):
    """Signals, two epochs of slots, staging: one after the other, and all on 256 bytes."""
    found = module.layout(world, push, pull)
    assert push <= found["push_stride"] < push + 256
    assert found["staging_offset"] == found["push_offset"] + 2 * world * found["push_stride"]
    assert pull <= found["total"] - found["staging_offset"] < pull + 256
    assert all(value % 256 == 0 for value in found.values())


def test_headers_differ_where_calls_do(module):
    headers = set()
    sizes = [1, 2, 4096, (1 << 40) - 1]
    for op, dtype, size, epoch in itertools.product((PUSH, PULL, TWO_SHOT), range(3), sizes, (0, 1, 2, 65_535)):
        header = module.pack_header(op, dtype, size, epoch)
        assert header != 0
        headers.add(header)
        fields = module.describe_header(header)
        assert fields == {"op": op, "dtype": dtype, "count": size, "sequence": epoch}
    assert len(headers) == 3 * 3 * len(sizes) * 4


def test_header_of_a_norm(module):
    shapes = list(itertools.product((1, 16_384), (128, 136, 8192), (64, 72, 8192)))
    headers = {module.pack_header(NORM, BF16, module.pack_qknorm_size(*shape), 3): shape for shape in shapes}
    assert len(headers) == len(shapes)
    for header, (tokens, q_width, k_width) in headers.items():
        fields = module.describe_header(header)
        assert (fields["tokens"], fields["q_width"], fields["k_width"]) == (tokens, q_width, k_width)


@pytest.mark.parametrize("epoch", [0, 1, 2, 3, 65_535, 65_536, 65_537, (1 << 32) - 1])
def test_an_old_header_is_told_from_a_new_one(module, epoch):
    """A slot holds nothing, the header of two calls ago, or this call's; the 16 bits that are sent wrap around."""
    old, new = (epoch - 2) % (1 << 32), epoch
    assert not module.is_of_epoch(0, epoch)
    assert not module.is_of_epoch(module.pack_header(PUSH, BF16, 1, old), epoch)
    assert module.is_of_epoch(module.pack_header(PUSH, BF16, 1, new), epoch)


@pytest.mark.parametrize("op", [PUSH, PULL, TWO_SHOT])
def test_launch_shape(module, op):
    """One block for little, never more than fit, and only what the header shows decides."""
    for world in (2, 3, 8):
        assert module.all_reduce_shape(op, BF16, 1, world, 64) == (1, 128 if op == PUSH else 512)
        assert module.all_reduce_shape(op, BF16, 1 << 30, world, 64) == (64, 512)
        assert module.all_reduce_shape(op, BF16, 1 << 30, world, 1000)[0] == (1000 if op == PUSH else 128)
        shapes = [module.all_reduce_shape(op, FP32, n, world, 64) for n in range(1, 200_000, 777)]
        threads = [blocks * threads for blocks, threads in shapes]
        assert threads == sorted(threads) and shapes[-1][0] > 1


def test_a_push_takes_more_blocks_before_larger_ones(module):
    assert module.all_reduce_shape(PUSH, BF16, 8 * 1024, 2, 264) == (8, 128)
    assert module.all_reduce_shape(PUSH, BF16, 8 * 264 * 128, 2, 264) == (264, 128)
    assert module.all_reduce_shape(PUSH, BF16, 8 * 264 * 200, 2, 264) == (207, 256)
    assert module.all_reduce_shape(PUSH, BF16, 8 * 264 * 5000, 2, 264) == (264, 512)


def test_two_shots_share_the_work(module):
    assert module.all_reduce_shape(TWO_SHOT, BF16, 8 * 512 * 8, 8, 64)[0] == 1
    assert module.all_reduce_shape(PULL, BF16, 8 * 512 * 8, 8, 64)[0] == 8


def test_qknorm_shape(module):
    """Narrow rows take a warp each, wide ones a block."""
    assert module.qknorm_shape(BF16, 1, 128, 64, 64) == (1, 256, 1)
    assert module.qknorm_shape(BF16, 16_384, 128, 64, 64) == (64, 256, 1)
    assert module.qknorm_shape(BF16, 5, 3072, 512, 64) == (5, 256, 8)
    assert module.qknorm_shape(FP32, 9, 256, 64, 64) == (3, 256, 2)


def test_bad_all_reduce(module):
    def check(op=PUSH, dtype=BF16, count=100, x=4096, out=8192, world=2, max_bytes=4096, max_push_bytes=1024):
        module.check_all_reduce(op, dtype, count, x, out, world, max_bytes, max_push_bytes)

    check()
    check(out=4096)
    check(out=4096 + 208, count=104)  # one after the other
    check(op=PULL, count=2048, out=65_536)
    for change, match in (
        ({"x": 4097}, r"x: got address 4097, 1 bytes past a multiple of 16"),
        ({"out": 8200}, r"out: got address 8200"),
        ({"out": 4096 + 192}, r"out: overlaps x in part"),
        ({"out": 4096 - 192}, r"out: overlaps x in part"),
        ({"count": 513}, r"x: got 1026 bytes; .*max_push_bytes=1024"),
        ({"op": PULL, "count": 2049, "out": 65_536}, r"x: got 4098 bytes; .*max_bytes=4096"),
        ({"count": 0}, r"count: got 0"),
        ({"dtype": 3}, r"dtype: got number 3"),
        ({"op": 7}, r"op: got number 7"),
    ):
        with pytest.raises(ValueError, match=match):
            check(**change)


def test_bad_norms(module):
    def check(tokens=4, q=4096, q_width=256, q_stride=512, k=8192, k_width=128, k_stride=512, qw=16, kw=32, world=2):
        module.check_tp_qknorm(BF16, tokens, q, q_width, q_stride, k, k_width, k_stride, qw, kw, world, 131_072)

    check()
    check(tokens=16_384, world=8)
    check(tokens=1, q_stride=3)  # of one row
    for change, match in (
        ({"tokens": 16_385}, "q: got 16385 tokens"),
        ({"world": 3}, "comm: got 3 ranks"),
        ({"q_width": 120}, "q: got a width of 120"),
        ({"q_width": 132, "q_stride": 512}, "q: got a width of 132"),
        ({"q_width": 8200, "q_stride": 8200}, "q: got a width of 8200"),
        ({"k_width": 56}, "k: got a width of 56"),
        ({"q_stride": 250}, "q: got a row stride of 250"),
        ({"k_stride": 516}, "k: got a row stride of 1032 bytes"),
        ({"q": 4098}, "q: got address 4098"),
        ({"k": 8193}, "k: got address 8193"),
        ({"qw": 8}, "q_weight: got address 8"),
        ({"kw": 4}, "k_weight: got address 4"),
    ):
        with pytest.raises(ValueError, match=match):
            check(**change)


def test_a_norm_needs_its_share_of_the_push_buffer(module):
    arguments = (BF16, 100, 4096, 256, 256, 8192, 128, 128, 16, 32, 2)
    module.check_tp_qknorm(*arguments, 800)
    with pytest.raises(ValueError, match="100 tokens, which push 800 bytes; .*max_push_bytes=799"):
        module.check_tp_qknorm(*arguments, 799)


@pytest.mark.parametrize(
    "options, match",
    [
        ((0, 1, 16, 16, 1), "world_size: got 1; .* 2 to 8"),
        ((0, 9, 16, 16, 1), "world_size: got 9"),
        ((2, 2, 16, 16, 1), "rank: got 2 of 2"),
        ((0, 2, 8, 16, 1), "max_bytes: got 8"),
        ((0, 2, 16, 8, 1), "max_push_bytes: got 8"),
        ((0, 2, (16 << 30) + 1, 16, 1), "max_bytes: got 17179869185; from 16 bytes to 16 GiB"),
        ((0, 2, 16, 16, 0), "timeout_s"),
    ],
)
def test_bad_options(module, options, match):
    module.check_options(1, 2, 16, 16, 1)
    with pytest.raises(ValueError, match=match):
        module.check_options(*options)


def test_without_a_gpu(module):
    """An error of its own that can be caught, not the end of the process."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(module.CudaError, match="cudaError"):
        module.Communicator(rank=0, world=2, device=0, max_bytes=16, max_push_bytes=16, timeout_ns=1, pdl=True)
