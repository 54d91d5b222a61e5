"""The bars that a result is held to: accuracy, and that nothing else was written."""

from __future__ import annotations

import math
from typing import Optional

import torch
from cases import Case


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance of ``value`` to the next number of the type."""
    return 2.0 ** math.floor(math.log2(value)) * torch.finfo(dtype).eps if value > 0 else 0.0


def assert_accurate(out: torch.Tensor, case: Case) -> None:
    """Frobenius error at most twice that of an fp32 computation rounded to the input type, plus one ulp of max|ref|.

    In 16 bits the ulp is granted once, to the norm. In fp32 each element gets it: there the yardstick is nothing but
    the order in which it happened to add. Only rows of ``out`` that a sequence owns are looked at. Each single row is
    held too, more loosely: over a large batch one wrong row would drown.
    """
    expected, dtype = case.expected, case.spec.dtype
    ref = expected.out[expected.used]
    if ref.numel() == 0:
        return
    got = out[expected.used].double()
    assert torch.isfinite(got).all(), f"{(~torch.isfinite(got)).sum()} of {got.numel()} elements are not finite"
    yardstick = (case.in_fp32.out[expected.used].to(dtype).double() - ref).norm().item()
    largest = ref.abs().max().item()
    error = (got - ref).norm().item()
    bar = 2 * yardstick + ulp(largest, dtype) * (ref.numel() ** 0.5 if dtype == torch.float32 else 1.0)
    worst = (got - ref).abs().amax(dim=(1, 2))
    row = int(worst.argmax())
    assert error <= bar, f"error {error:.3e} > {bar:.3e} (|ref| {ref.norm():.3e}, worst row {row}: {worst[row]:.3e})"
    row_bar = max(4 * torch.finfo(dtype).eps, 1e-5) * largest
    assert worst[row] <= row_bar, f"row {row}: error {worst[row]:.3e} > {row_bar:.3e}, max|ref| {largest:.3e}"


def assert_lse(lse: torch.Tensor, case: Case) -> None:
    """fp32 ``[T, Hq]``, -inf where nothing is seen and outside the sequences."""
    expected = case.expected.lse
    assert lse.dtype == torch.float32 and lse.shape == expected.shape
    empty = torch.isneginf(expected)
    assert torch.isneginf(lse[empty]).all()
    error = (lse.double() - expected)[~empty].abs()
    bar = 2e-5 * (1 + expected[~empty].abs())
    assert (error <= bar).all(), f"largest LSE error {error.max():.3e}"


def assert_untouched(buffer: torch.Tensor, case: Case) -> None:
    """Rows that no sequence owns and the layout's gaps are still poison."""
    assert torch.isnan(buffer[~case.expected.used]).all(), "a row outside qo_indptr was written"
    assert torch.isnan(buffer[:, :, case.spec.dim_v :]).all(), "the gap behind a row was written"


def assert_right(case: Case, out: torch.Tensor, buffer: torch.Tensor, lse: Optional[torch.Tensor]) -> None:
    assert_untouched(buffer, case)
    assert_accurate(out, case)
    if lse is not None:
        assert_lse(lse, case)
