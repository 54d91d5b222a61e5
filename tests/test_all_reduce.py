"""All-reduce on virtual ranks; under torchrun, the same on real GPUs. Sums are compared bit for bit."""

from __future__ import annotations

import pytest
import torch
from ranks import (
    ALGOS,
    DTYPES,
    WORLDS,
    assert_same_bits,
    capture,
    expected_sum,
    integers,
    normals,
    poisoned_like,
    shared,
)

pytestmark = pytest.mark.gpu

# Elements: less than a vector, whole vectors, odd tails, more than one pass of the grid, the largest that fits (fp32).
SIZES = [1, 7, 16, 17, 1000, 1023, 8192, 65539, 1 << 20, (1 << 20) + 5, 4 << 20]


@pytest.fixture(params=WORLDS, ids=lambda n: f"world{n}")
def ranks(request):
    return shared(request.param)


def names(dtype) -> str:
    return str(dtype).replace("torch.", "")


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("algo", ALGOS)
def test_eager_sums_are_exact(ranks, algo, dtype):
    for number, count in enumerate(SIZES):
        for make in (integers, normals):
            every = make(ranks.world, count, dtype, seed=number)
            xs, want = ranks.local(every), expected_sum(every)
            outs = poisoned_like(xs)
            ranks.wait()
            ranks.each(lambda comm, x, out: comm.all_reduce(x, out=out, algo=algo), xs, outs)
            ranks.check()
            for rank, out in zip(ranks.mine, outs):
                assert_same_bits(out, want, f"{count} elements, rank {rank}")
            for rank, x in zip(ranks.mine, xs):
                assert_same_bits(x, every[rank], f"the input of rank {rank} was written")


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("algo", ALGOS)
def test_in_place(ranks, algo, dtype):
    for number, count in enumerate(SIZES):
        every = normals(ranks.world, count, dtype, seed=100 + number)
        want = expected_sum(every)
        xs = [x.clone() for x in ranks.local(every)]
        ranks.wait()
        ranks.each(lambda comm, x: comm.all_reduce(x, out=x, algo=algo), xs)
        ranks.check()
        for x in xs:
            assert_same_bits(x, want, f"{count} elements")


@pytest.mark.parametrize("count", [13, 4099])
@pytest.mark.parametrize("algo", ALGOS)
def test_nothing_past_the_end_is_written(ranks, algo, count):
    every = integers(ranks.world, count, torch.bfloat16, seed=3)
    xs = ranks.local(every)
    room = [torch.full((count + 64,), 77.0, dtype=torch.bfloat16, device=ranks.device) for _ in xs]
    outs = [r[:count] for r in room]
    ranks.wait()
    ranks.each(lambda comm, x, out: comm.all_reduce(x, out=out, algo=algo), xs, outs)
    ranks.check()
    for r in room:
        assert_same_bits(r[:count], expected_sum(every))
        assert (r[count:] == 77.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("algo", ALGOS)
def test_special_values(ranks, algo, dtype):
    """NaN, infinities, denormals, both zeros, the largest number, in each rank against ordinary ones and each other."""
    info = torch.finfo(dtype)
    special = [float("nan"), float("inf"), float("-inf"), info.smallest_normal / 4, -info.smallest_normal / 4]
    special += [0.0, -0.0, info.max, -info.max, 1.0, info.tiny, info.eps]
    rows = []
    for rank in range(ranks.world):
        row = [special[(i * (2 * rank + 1) + i // len(special)) % len(special)] for i in range(509)]
        rows.append(torch.tensor(row, dtype=dtype, device=ranks.device))
    for every in (
        rows,
        [torch.zeros(333, dtype=dtype, device=ranks.device) for _ in rows],
        [torch.full((333,), -0.0, dtype=dtype, device=ranks.device) for _ in rows],
    ):
        xs, want = ranks.local(every), expected_sum(every)
        outs = poisoned_like(xs)
        ranks.wait()
        ranks.each(lambda comm, x, out: comm.all_reduce(x, out=out, algo=algo), xs, outs)
        ranks.check()
        for out in outs:
            assert_same_bits(out, want)
            assert not (out.signbit() & (out == 0)).any(), "a zero sum is +0"


def test_zero_elements(ranks):
    """Returns without a launch, and the epoch stays."""
    before = [comm._core.epoch() for comm in ranks.comms]
    for comm in ranks.comms:
        x = torch.empty(0, dtype=torch.bfloat16, device=ranks.device)
        assert comm.all_reduce(x).numel() == 0
        assert comm.all_reduce(x, out=x) is x
    assert [comm._core.epoch() for comm in ranks.comms] == before


@pytest.mark.parametrize("copied", [False, True], ids=["registered", "copied"])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("algo", ALGOS)
def test_graphs(ranks, algo, dtype, copied, monkeypatch):
    """Four layers a graph, in place and not, of different sizes; 16 replays with other inputs, eager calls between."""
    if copied:  # as if the memory could not be exported
        for comm in ranks.comms:
            monkeypatch.setattr(comm, "_export", lambda address: None)
            comm._say_once = lambda message: None
    counts = [4096, 65539, 17, 300_000]
    statics = [[torch.empty(count, dtype=dtype, device=ranks.device) for count in counts] for _ in ranks.mine]
    outs = [[torch.empty_like(x) for x in xs] for xs in statics]

    def body(comm, xs, ys):
        for layer, (x, y) in enumerate(zip(xs, ys)):
            if layer % 2:
                y.copy_(x)
                comm.all_reduce(y, out=y, algo=algo)
            else:
                comm.all_reduce(x, out=y, algo=algo)

    ranks.wait()
    graphs, _ = capture(ranks, body, statics, outs)
    eager_in = normals(ranks.world, 1000, dtype, seed=1)
    eager_outs = poisoned_like(ranks.local(eager_in))
    for loop in range(16):
        every = [normals(ranks.world, count, dtype, seed=1000 * loop + layer) for layer, count in enumerate(counts)]
        for number, rank in enumerate(ranks.mine):
            for layer in range(len(counts)):
                statics[number][layer].copy_(every[layer][rank])
                outs[number][layer].fill_(float("nan"))
        ranks.wait()
        ranks.each(lambda comm, graph: graph.replay(), graphs)
        ranks.wait()
        if loop % 3 == 0:
            ranks.each(lambda comm, x, out: comm.all_reduce(x, out=out, algo=algo), ranks.local(eager_in), eager_outs)
        ranks.check()
        for number in range(len(ranks.mine)):
            for layer in range(len(counts)):
                assert_same_bits(outs[number][layer], expected_sum(every[layer]), f"loop {loop}, layer {layer}")
            assert_same_bits(eager_outs[number], expected_sum(eager_in))


def test_mixed_calls_share_the_epochs(ranks):
    """Algorithms, types and sizes in turn, without a wait between: every call finds clean slots."""
    calls = [(algo, dtype, count) for count in (5, 4096, 100_003) for dtype in DTYPES for algo in ALGOS] * 3
    every = [normals(ranks.world, count, dtype, seed=n) for n, (_, dtype, count) in enumerate(calls)]
    xs = [ranks.local(inputs) for inputs in every]
    outs = [poisoned_like(x) for x in xs]
    ranks.wait()
    for number, (algo, _, _) in enumerate(calls):
        ranks.each(lambda comm, x, out: comm.all_reduce(x, out=out, algo=algo), xs[number], outs[number])  # noqa: B023
    ranks.check()
    for number, call in enumerate(calls):
        for out in outs[number]:
            assert_same_bits(out, expected_sum(every[number]), str(call))


def test_auto_is_right_at_every_size(ranks):
    for number, count in enumerate(SIZES):
        every = integers(ranks.world, count, torch.bfloat16, seed=number)
        xs = ranks.local(every)
        outs = poisoned_like(xs)
        ranks.wait()
        ranks.each(lambda comm, x, out: comm.all_reduce(x, out=out), xs, outs)
        ranks.check()
        for out in outs:
            assert_same_bits(out, expected_sum(every), f"{count} elements")


def test_a_call_on_another_stream_comes_after_the_one_before(ranks):
    """Eager calls are one order, whatever their streams: the second one's input is the first one's output."""
    every = integers(ranks.world, 200_000, torch.float32, seed=8)
    xs = [x.clone() for x in ranks.local(every)]
    others = [torch.cuda.Stream(ranks.device) for _ in xs]
    ranks.wait()
    for repeat in range(8):
        streams = others if repeat % 2 else ranks.streams
        for comm, stream, x in zip(ranks.comms, streams, xs):
            with torch.cuda.stream(stream):
                comm.all_reduce(x, out=x, algo=ALGOS[repeat % 3])
    ranks.check()
    want = expected_sum(every) * ranks.world**7
    for x in xs:
        assert torch.equal(x, want)
