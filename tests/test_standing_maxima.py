"""How long a row's maximum may stand in the Hopper families, in a model of their order of operations.

Weights are rounded to bf16 for the products. A maximum's own weight is 1 and loses nothing; that of a key which outdoes
a maximum that stands is rounded, and shows where it takes nearly all of the sum, unless that is rounded with it. A GPU
holds the kernels themselves to the same bar (test_accuracy.py).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import List

import pytest
import torch

import extend_attn

HOPPER = Path(extend_attn.__file__).parent / "kernels" / "hopper"
BAR = 2e-3  # of the largest output, bf16 in and fp32 out
TILE, DIM, HEADS = 64, 256, 4
SPREAD = 2.0  # of queries: logits of a spread of two, where a few keys take most of the weight


def constant(module: str, names: str) -> List[float]:
    """The numbers that a kernel's module gives these names; read as text, since Gluon is not imported beside Triton's
    interpreter."""
    (line,) = re.findall(rf"^{names} = (.*)$", (HOPPER / module).read_text(), re.MULTILINE)
    return [float(number) for number in re.findall(r"constexpr\(([\d.]+)\)", line)]


def sequence(new: int, keys: int, generator: torch.Generator):
    """(logits in base 2, values, fp64 output) of new tokens at the end of so many keys."""
    q = (SPREAD * torch.randn(HEADS, new, DIM, generator=generator)).bfloat16().float()
    k, v = (torch.randn(HEADS, keys, DIM, generator=generator).bfloat16().float() for _ in range(2))
    hidden = ~torch.ones(new, keys, dtype=torch.bool).tril(keys - new)
    logits = (q @ k.transpose(1, 2) * (DIM**-0.5 * math.log2(math.e))).masked_fill(hidden, -math.inf)
    return logits, v, torch.softmax(logits.double() * math.log(2), -1) @ v.double()


def fold(logits: torch.Tensor, v: torch.Tensor, tiles, slack, rounded: bool) -> torch.Tensor:
    """The online softmax over key tiles in this order; ``slack(place)`` [rows] of the tile in that place. ``rounded``:
    sums are those of the weights as they are multiplied."""
    heads, rows, _ = logits.shape
    out, m, l = torch.zeros(heads, rows, DIM), torch.full((heads, rows), -3.0e38), torch.zeros(heads, rows)
    for place, tile in enumerate(tiles):
        columns = slice(tile * TILE, (tile + 1) * TILE)
        highest = logits[:, :, columns].amax(-1)
        higher = torch.where(highest > m + slack(place), highest, m)
        alpha, m = torch.exp2(m - higher), higher
        p = torch.exp2(logits[:, :, columns] - m[..., None])
        weights = p.bfloat16().float()
        out = out * alpha[..., None] + weights @ v[:, columns]
        l = l * alpha + (weights if rounded else p).sum(-1)
    return out / l[..., None]


def largest_error(cases, tiles_of, slack_of, rounded: bool = False) -> float:
    error = largest = 0.0
    for logits, v, wanted in cases:
        got = fold(logits, v, tiles_of(logits), slack_of(logits), rounded)
        error = max(error, (got - wanted).abs().max().item())
        largest = max(largest, wanted.abs().max().item())
    return error / largest


def verification(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return [sequence(4, 1004, generator) for _ in range(24)]


def prompts(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return [sequence(512, 512, generator) for _ in range(4)]


def upwards(logits):
    return range(-(-logits.shape[2] // TILE))


def downwards(logits):
    return reversed(upwards(logits))


def packed(slack: float):
    return lambda logits: lambda place: torch.tensor(0.0 if place == 0 else slack)


def tiled(slack: float, exact: float):
    """A row begins with the tile of its diagonal; for those before, it sees nothing."""

    def of(logits):
        last = logits.shape[2] // TILE - 1
        begun = last - torch.arange(logits.shape[1]) // TILE  # the place of each row's first tile
        return lambda place: torch.where(place <= begun + exact, 0.0, slack)

    return of


@pytest.mark.parametrize("seed", range(3))
def test_packed(seed):
    slack, slack_lse = constant("softmax.py", "SLACK, SLACK_LSE")
    cases = verification(seed)
    assert largest_error(cases, upwards, packed(slack), rounded=True) < 0.75 * BAR
    assert largest_error(cases, upwards, packed(slack_lse)) < 0.75 * BAR


@pytest.mark.parametrize("seed", range(3))
def test_tiled(seed):
    cases = prompts(seed)
    slack, exact = constant("tiled_softmax.py", "SLACK, EXACT")
    assert largest_error(cases, downwards, tiled(slack, exact)) < 0.85 * BAR


def test_what_stood_too_long():
    """2^8, as both once did: the bar would be missed, so that this file can fail."""
    exact = [largest_error(verification(seed), upwards, packed(8.0)) for seed in range(3)]
    assert max(exact) > BAR
    assert largest_error(verification(0), upwards, packed(8.0), rounded=True) < 0.85 * exact[0]
    assert max(largest_error(prompts(seed), downwards, tiled(8.0, 0)) for seed in range(3)) > BAR
