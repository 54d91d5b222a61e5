"""Is a result right? A bench that times a wrong answer says nothing."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

# Bars for "the same function", not for accuracy: a bf16 output alone is off by 2e-3 to 4e-3 of its maximum, and peers
# round P to bf16 as well. A wrong mask or a missed key is off by 1e-1 and more.
WORST_ELEMENT = 2e-2
WORST_FROBENIUS = 1e-2


class Error(NamedTuple):
    """max|out - ref| / max|ref| and ||out - ref|| / ||ref||; inf where an element is not finite."""

    max: float
    frobenius: float

    @property
    def wrong(self) -> bool:
        return not (self.max < WORST_ELEMENT and self.frobenius < WORST_FROBENIUS)

    def __str__(self) -> str:
        return f"max error {self.max:.3g} (bar {WORST_ELEMENT}), Frobenius {self.frobenius:.3g} (bar {WORST_FROBENIUS})"


def error_of(out: torch.Tensor, reference: torch.Tensor) -> Error:
    """Error of ``out`` against the fp32 ``reference`` of the same shape."""
    if out.shape != reference.shape:
        raise ValueError(f"out: shape is {tuple(out.shape)}, the reference's is {tuple(reference.shape)}")
    difference = out.float() - reference
    if not bool(torch.isfinite(difference).all()):
        return Error(math.inf, math.inf)
    largest, norm = reference.abs().max(), torch.linalg.vector_norm(reference)
    return Error(
        max=float(difference.abs().max() / largest.clamp(min=1e-30)),
        frobenius=float(torch.linalg.vector_norm(difference) / norm.clamp(min=1e-30)),
    )
