"""What differs between the Triton versions this library supports (3.2 to 3.9), here and only here."""

from __future__ import annotations

import contextlib
import os
from typing import Tuple

import triton

TRITON_VERSION: Tuple[int, int] = tuple(int(part) for part in triton.__version__.split(".")[:2])  # type: ignore[assignment]

OutOfResources = triton.runtime.OutOfResources

try:  # programmatic dependent launch: Triton 3.4 and later
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    HAS_PDL = True
except ImportError:
    HAS_PDL = False

    @triton.jit
    def gdc_wait():
        pass

    @triton.jit
    def gdc_launch_dependents():
        pass


with contextlib.suppress(ImportError):  # host-side TMA descriptors: Triton 3.4 and later; plan/legality.py knows
    from triton.tools.tensor_descriptor import TensorDescriptor


def tensor_descriptor(t, box):
    """A TMA descriptor of tensor ``t`` that loads boxes of this shape."""
    strides = [stride if size > 1 else 16 for size, stride in zip(t.shape, t.stride())]  # must be aligned all the same
    return TensorDescriptor(t, list(t.shape), [*strides[:-1], 1], box)


# Triton reads the variable when a kernel is decorated, so it is read here at the same time.
INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")

CAN_PDL: bool = HAS_PDL and not INTERPRETED


def launch_options(pdl: bool) -> dict:
    """The launch keyword arguments for programmatic dependent launch."""
    return {"launch_pdl": True} if pdl else {}
