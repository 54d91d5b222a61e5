"""The protocol's epochs, every interleaving of two ranks: nothing is lost, overwritten or waited for without end."""

from __future__ import annotations

import itertools

import pytest
from epoch_model import Model, Protocol, Violation, explore

OPS = ("push", "pull", "norm")


@pytest.mark.parametrize("ops", list(itertools.product(OPS, repeat=4)), ids="-".join)
def test_two_ranks_four_calls(ops):
    assert explore(Model(ops)) > 4 * len(ops)


@pytest.mark.parametrize("ops", [("push", "push"), ("push", "pull"), ("pull", "norm"), ("pull", "pull")], ids="-".join)
def test_two_blocks(ops):
    """The header is one block's, and the next call begins when all blocks are through."""
    explore(Model(ops, blocks=2))


def test_three_ranks():
    explore(Model(("push",), ranks=3))


@pytest.mark.parametrize(
    "broken, ops, what",
    [
        (Protocol(epochs=1), ("push",) * 3, "holds|loses|takes|sees|wait"),
        (Protocol(end_barrier=False), ("pull",) * 2, "reads"),
        (Protocol(release_orders=False), ("pull",), "reads"),
        (Protocol(calls_end=False), ("push",) * 4, "holds|loses"),
        (Protocol(clears=False), ("push",) * 3, "holds|takes"),
    ],
    ids=["one epoch", "pull without end", "pull without release", "calls that overlap", "no clearing"],
)
def test_the_model_notices_a_broken_rule(broken, ops, what):
    with pytest.raises(Violation, match=what):
        explore(Model(ops, protocol=broken))


def test_ranks_in_different_calls_are_noticed():
    """Not a hang and not a wrong sum: the headers differ."""

    class Apart(Model):
        def _step(self, state, memory, rank, block):
            ops, self.ops = self.ops, ("push",) if rank else ("norm",)
            try:
                return super()._step(state, memory, rank, block)
            finally:
                self.ops = ops

    model = Apart(("push",))
    model.programs["norm"] = model.programs["push"]
    with pytest.raises(Violation, match="sees the header"):
        explore(model)
