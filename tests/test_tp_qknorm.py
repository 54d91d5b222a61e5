"""fused_parallel_qknorm on virtual ranks; under torchrun, the same on real GPUs."""

from __future__ import annotations

import pytest
import torch
from ranks import DTYPES, TORCHRUN, WORLDS, assert_same_bits, capture, expected_sum, normals, poisoned_like, shared

import extend_attn

pytestmark = pytest.mark.gpu

EPS = 1e-6
# Full widths of q and k, sharded over the ranks: the shape that SGLang's kernel is made for, and Gemma's q and k heads.
FULL_WIDTHS = [(6144, 1024), (4096, 2048), (2048, 512)]
# Widths of one rank that fill neither warps nor blocks, and the limits.
RANK_WIDTHS = [(128, 64), (136, 72), (1000, 328), (8192, 8192), (5000, 64)]


@pytest.fixture(params=[n for n in WORLDS if n in (2, 4, 8)], ids=lambda n: f"world{n}")
def ranks(request):
    return shared(request.param)


class Case:
    """Inputs of all ranks, and what each rank should hold."""

    def __init__(self, ranks, tokens, q_width, k_width, dtype, *, seed=0, padding=(0, 0), scale=1.0):
        self.tokens, self.widths = tokens, (q_width, k_width)
        self.rows = []  # per rank: q and k as the caller has them, perhaps with gaps between rows
        self.weights = []
        generator = torch.Generator(ranks.device).manual_seed(seed)
        for _ in range(ranks.world):
            pair, weights = [], []
            for width, gap in zip(self.widths, padding):
                values = torch.randn(tokens, width + gap, device=ranks.device, generator=generator) * scale
                pair.append(values.to(dtype))
                weights.append((1 + torch.randn(width, device=ranks.device, generator=generator) / 4).to(dtype))
            self.rows.append(pair)
            self.weights.append(weights)

    def view(self, rank):
        return [rows[:, :width] for rows, width in zip(self.rows[rank], self.widths)]

    def reference(self, rank, eps=EPS):
        """In fp64, over the full width."""
        results = []
        for side in range(2):
            shards = [self.view(r)[side].double() for r in range(len(self.rows))]
            mean = sum((x * x).sum(dim=1) for x in shards) / (len(shards) * self.widths[side])
            results.append(shards[rank] * torch.rsqrt(mean + eps)[:, None] * self.weights[rank][side].double())
        return results


def run(ranks, case, eps=EPS):
    """In place on copies of the local ranks' rows; the rows afterwards, whole."""
    whole = [[rows.clone() for rows in case.rows[rank]] for rank in ranks.mine]
    views = [[rows[:, :width] for rows, width in zip(pair, case.widths)] for pair in whole]
    weights = [case.weights[rank] for rank in ranks.mine]
    ranks.wait()
    ranks.each(lambda comm, qk, w: extend_attn.fused_parallel_qknorm(comm, *qk, *w, eps), views, weights)
    ranks.check()
    return whole


def assert_close(got, want, dtype):
    """A result is rounded once from fp32: half a unit in the last place, and fp32's error of a few products before."""
    # eps is one unit in the last place of 1: half of it is the rounding; fp32 sums add a few of its own units.
    bound = torch.finfo(dtype).eps * 0.5 + 16 * torch.finfo(torch.float32).eps
    error = (got.double() - want).abs()
    floor = torch.finfo(dtype).tiny
    assert (error <= bound * 1.01 * want.abs() + floor).all(), (
        f"{(error / (want.abs() + floor)).max().item()} > {bound}"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).replace("torch.", ""))
@pytest.mark.parametrize("full", FULL_WIDTHS, ids=lambda f: f"{f[0]}_{f[1]}")
def test_model_shapes(ranks, full, dtype):
    q_width, k_width = full[0] // ranks.world, full[1] // ranks.world
    for tokens in (1, 2, 3, 17, 64, 129, 1000, 8192):
        case = Case(ranks, tokens, q_width, k_width, dtype, seed=tokens)
        for rank, whole in zip(ranks.mine, run(ranks, case)):
            for got, want in zip(whole, case.reference(rank)):
                assert_close(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).replace("torch.", ""))
@pytest.mark.parametrize("widths", RANK_WIDTHS, ids=lambda w: f"{w[0]}_{w[1]}")
def test_any_width_and_stride(ranks, widths, dtype):
    """Also rows with gaps, which stay as they are."""
    for tokens, padding in ((5, (8, 64)), (301, (0, 16))):
        case = Case(ranks, tokens, *widths, dtype, seed=tokens, padding=padding)
        for rank, whole in zip(ranks.mine, run(ranks, case)):
            for side, want in enumerate(case.reference(rank)):
                width = widths[side]
                assert_close(whole[side][:, :width], want, dtype)
                assert_same_bits(whole[side][:, width:], case.rows[rank][side][:, width:], "the gap between rows")


@pytest.mark.parametrize("tokens", [4096, 16384])
def test_many_tokens(ranks, tokens):
    case = Case(ranks, tokens, 128, 64, torch.bfloat16, seed=1)
    for rank, whole in zip(ranks.mine, run(ranks, case)):
        for got, want in zip(whole, case.reference(rank)):
            assert_close(got, want, torch.bfloat16)


def test_columns_of_one_tensor(ranks):
    """q and k of a fused projection: rows interleaved in memory."""
    case = Case(ranks, 33, 512, 128, torch.bfloat16, seed=4)
    fused = [torch.cat([*case.view(rank), torch.ones_like(case.view(rank)[1])], dim=1) for rank in ranks.mine]
    weights = [case.weights[rank] for rank in ranks.mine]
    ranks.wait()

    def call(comm, qkv, w):
        extend_attn.fused_parallel_qknorm(comm, qkv[:, :512], qkv[:, 512:640], *w, EPS)

    ranks.each(call, fused, weights)
    ranks.check()
    for rank, qkv in zip(ranks.mine, fused):
        q, k = case.reference(rank)
        assert_close(qkv[:, :512], q, torch.bfloat16)
        assert_close(qkv[:, 512:640], k, torch.bfloat16)
        assert (qkv[:, 640:] == 1).all(), "v is not ours"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).replace("torch.", ""))
def test_zero_rows(ranks, dtype):
    """A zero row with eps 0 gives what PyTorch gives (0 * inf = NaN); with an eps, zeros. The others are as ever."""
    for eps in (0.0, EPS):
        case = Case(ranks, 6, 256, 128, dtype, seed=2)
        for pair in case.rows:
            pair[0][2] = 0
            pair[1][4] = 0
            pair[1][5] = -0.0
        for rank, whole in zip(ranks.mine, run(ranks, case, eps)):
            for side, want in enumerate(case.reference(rank, eps)):
                assert torch.equal(whole[side].isnan(), want.isnan())
                assert_close(whole[side].nan_to_num(), want.nan_to_num(), dtype)


def test_not_finite(ranks):
    """NaN in one rank's row: that row is NaN on every rank, others are not."""
    case = Case(ranks, 4, 256, 128, torch.bfloat16, seed=2)
    case.rows[ranks.world - 1][0][1, 3] = float("nan")
    case.rows[0][1][2, 5] = float("inf")
    for rank, whole in zip(ranks.mine, run(ranks, case)):
        for side, want in enumerate(case.reference(rank)):
            assert torch.equal(whole[side].isnan(), want.isnan())


def test_no_tokens(ranks):
    before = [comm._core.epoch() for comm in ranks.comms]
    case = Case(ranks, 0, 256, 128, torch.bfloat16)
    run(ranks, case)
    assert [comm._core.epoch() for comm in ranks.comms] == before


def test_turns_with_the_all_reduce(ranks):
    """Both push into the same slots, in any order of calls, eager and in a graph."""
    case = Case(ranks, 40, 768, 128, torch.bfloat16, seed=9)
    every = normals(ranks.world, 30_000, torch.bfloat16, seed=5)
    xs, want = ranks.local(every), expected_sum(every)
    weights = [case.weights[rank] for rank in ranks.mine]
    order = ["norm", "push", "push", "norm", "norm", "pull", "norm", "push"]
    work = [[[rows.clone() for rows in case.rows[rank]] for _ in order] for rank in ranks.mine]
    outs = [[torch.empty_like(x) for _ in order] for x in xs]

    def body(comm, x, w, mine, ys):
        for step, op in enumerate(order):
            if op == "norm":
                extend_attn.fused_parallel_qknorm(comm, *mine[step], *w, EPS)
            else:
                comm.all_reduce(x, out=ys[step], algo="one_shot_push" if op == "push" else "two_shot_pull")

    def look():
        ranks.check()
        for number, rank in enumerate(ranks.mine):
            for step, op in enumerate(order):
                if op == "norm":
                    for got, should in zip(work[number][step], case.reference(rank)):
                        assert_close(got, should, torch.bfloat16)
                else:
                    assert_same_bits(outs[number][step], want, f"step {step}")

    def renew():
        for number, rank in enumerate(ranks.mine):
            for step in range(len(order)):
                for rows, fresh in zip(work[number][step], case.rows[rank]):
                    rows.copy_(fresh)
                outs[number][step].fill_(float("nan"))
        ranks.wait()

    renew()
    ranks.each(body, xs, weights, work, outs)
    look()
    graphs, _ = capture(ranks, body, xs, weights, work, outs)
    for _ in range(5):
        renew()
        ranks.each(lambda comm, graph: graph.replay(), graphs)
        look()


@pytest.mark.skipif(TORCHRUN, reason="the ranks of a torchrun job are as many as it has")
def test_three_ranks_are_refused():
    ranks = shared(3)
    case = Case(ranks, 4, 256, 128, torch.bfloat16)
    with pytest.raises(ValueError, match="2, 4 and 8"):
        run(ranks, case)
    every = normals(3, 999, torch.bfloat16, seed=5)
    outs = poisoned_like(every)
    ranks.wait()
    ranks.each(lambda comm, x, out: comm.all_reduce(x, out=out, algo="two_shot_pull"), every, outs)
    ranks.check()
    for out in outs:
        assert_same_bits(out, expected_sum(every))
