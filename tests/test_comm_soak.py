"""Many calls without a pause: all operations, algorithms, types and sizes in changing order, with random stalls.

EXTEND_ATTN_SOAK is the number of calls a rank makes in each test (100000 with four ranks take 77 s on an H100).
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from ranks import ALGOS, DTYPES, WORLDS, assert_same_bits, capture, expected_sum, integers, shared

import extend_attn

pytestmark = pytest.mark.gpu

CALLS = int(os.environ.get("EXTEND_ATTN_SOAK", "3000"))
REDUCTIONS, NORMS, GRAPHS = 180, 60, 10
SIZES = [1, 3, 8, 17, 64, 512, 1000, 4096, 4099, 16_384, 65_539, 200_000]


@pytest.mark.parametrize("stall_ns", [0, 3000], ids=["at once", "with stalls"])
@pytest.mark.parametrize("world", [n for n in WORLDS if n in (2, 4, 8)], ids=lambda n: f"world{n}")
def test_soak(world, stall_ns):
    ranks = shared(world)
    draw = random.Random(world)
    steps, checks = [], []  # steps: per call, what each local rank does; checks: after a round, what should be there
    kept = []  # a graph reads its inputs where they were; nothing else holds them
    for number in range(REDUCTIONS):
        count, dtype = draw.choice(SIZES), draw.choice(DTYPES)
        every = integers(world, count, dtype, seed=number)
        xs = ranks.local(every)
        outs = [torch.empty_like(x) for x in xs]
        steps.append((lambda comm, x, out, algo: comm.all_reduce(x, out=out, algo=algo), xs, outs, draw.choice(ALGOS)))
        checks.append((outs, expected_sum(every)))
    for number in range(NORMS):
        steps.append(_norm(ranks, draw, number, checks))
    for number in range(GRAPHS):
        every = integers(world, 4099, torch.bfloat16, seed=number)
        xs = ranks.local(every)
        kept.append(xs)
        outs = [torch.empty_like(x) for x in xs]
        algo = ALGOS[number % len(ALGOS)]
        graphs, _ = capture(ranks, lambda c, x, out: c.all_reduce(x, out=out, algo=algo), xs, outs)  # noqa: B023
        steps.append((lambda comm, graph, _, algo: graph.replay(), graphs, outs, None))
        checks.append((outs, expected_sum(every)))
    for comm in ranks.comms:
        comm._core.set_jitter_ns(stall_ns)
    try:
        for round_number in range(max(1, CALLS // len(steps))):
            for outs, _ in checks:
                for out in outs:
                    out.fill_(float("nan"))
            ranks.wait()
            order = random.Random(round_number).sample(range(len(steps)), len(steps))  # the same on every rank
            for step in order:
                call, inputs, outs, algo = steps[step]
                ranks.each(lambda comm, x, out: call(comm, x, out, algo), inputs, outs)  # noqa: B023
            ranks.check()
            for number, (outs, want) in enumerate(checks):
                for out in outs:
                    assert_same_bits(out, want, f"round {round_number}, call {number}")
    finally:
        for comm in ranks.comms:
            comm._core.set_jitter_ns(0)


def _norm(ranks, draw, number, checks):
    """A norm in a graph of its own: rows put back, then scaled. Its first result is what it should give ever after."""
    tokens, q_width, k_width = (
        draw.choice([1, 2, 5, 33, 300]),
        draw.choice([128, 136, 768]),
        draw.choice([64, 128, 328]),
    )
    dtype = draw.choice(DTYPES)
    generator = torch.Generator(ranks.device).manual_seed(number)
    fresh = []
    for _ in range(ranks.world):
        rows = torch.randn(tokens, q_width + k_width, device=ranks.device, generator=generator)
        fresh.append(rows.to(dtype))
    weights = (
        torch.ones(q_width, dtype=dtype, device=ranks.device),
        torch.ones(k_width, dtype=dtype, device=ranks.device),
    )
    mine = ranks.local(fresh)
    work = [torch.empty_like(rows) for rows in mine]

    def call(comm, rows, out, _=None):
        out.copy_(rows)
        extend_attn.fused_parallel_qknorm(comm, out[:, :q_width], out[:, q_width:], *weights, 1e-6)

    ranks.wait()
    ranks.each(call, mine, work)
    ranks.check()
    for rank, rows in zip(ranks.mine, work):
        for columns in (slice(0, q_width), slice(q_width, None)):
            shards = torch.cat([f[:, columns] for f in fresh], dim=1).double()
            factor = torch.rsqrt(shards.square().mean(dim=1, keepdim=True) + 1e-6)
            want = fresh[rank][:, columns].double() * factor
            assert torch.allclose(rows[:, columns].double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)
        checks.append(([rows], rows.clone()))
    return call, mine, work, None
