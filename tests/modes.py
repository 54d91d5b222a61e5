"""Where a contract test runs, and through which kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

import bars
import pytest
import torch
from cases import LARGE, SMALL, SPLIT, TINY, Case, make_case


@dataclass(frozen=True)
class Mode:
    """Where a contract test runs. plan: fields of the plan to force (None: the reference, which takes no plan)."""

    name: str
    device: str = "cpu"
    plan: Optional[Dict[str, Any]] = None

    @property
    def kernel(self) -> bool:
        return self.plan is not None

    @property
    def gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def hopper(self) -> bool:
        return self.kernel and self.plan["family"].startswith("hopper_")

    @property
    def dtype(self) -> torch.dtype:
        """The type that most tests use here: exact where it is cheap, what engines use on a GPU."""
        return torch.bfloat16 if self.gpu else torch.float32

    @property
    def splits(self) -> bool:
        return self.kernel and self.plan.get("split_kv", 1) > 1

    def case(self, **spec) -> Case:
        """A case of this mode: its type, on its device, at its size."""
        size: Dict[str, Any] = {"lengths": list(SPLIT if self.splits else TINY if self.kernel else SMALL)}
        if self.gpu:
            size = {"lengths": list(LARGE), "dim": 64}
        return make_case(**{"dtype": self.dtype, "device": self.device, **size, **spec})

    def call(
        self, case: Case, out: Optional[torch.Tensor] = None, **kwargs
    ) -> Tuple[torch.Tensor, torch.Tensor, Any]:  # fmt: skip
        """(output, its poisoned buffer, what the function returned); ``out``: another to write to, its own buffer."""
        import extend_attn

        out, buffer = case.out() if out is None else (out, out)
        if self.kernel:
            kwargs.setdefault("plan", dict(self.plan))
        try:
            if case.spec.unified:
                returned = extend_attn.extend_attention_fwd_unified(o=out, **case.kwargs, **kwargs)
            else:
                returned = extend_attn.extend_attention_fwd(o_extend=out, **case.kwargs, **kwargs)
        except ValueError as error:  # a Hopper family leaves to the plain ones what it has no way to run
            if not self.hopper or "cannot run here" not in str(error):
                raise
            pytest.skip(str(error))
        return out, buffer, returned

    def check(self, case: Case, **kwargs) -> torch.Tensor:
        """Call, and hold output, LSE and everything that must not be written to the contract. Returns the output."""
        out, buffer, lse = self.call(case, return_lse=True, **kwargs)
        bars.assert_right(case, out, buffer, lse)
        return out


KERNELS: Dict[str, Dict[str, Any]] = {
    "tiled": {"family": "tiled", "pack_gqa": False},
    "tiled_gqa": {"family": "tiled", "pack_gqa": True},
    "packed": {"family": "packed", "split_kv": 1},
    "packed_split3": {"family": "packed", "split_kv": 3},
}
# The Gluon twins: every test that runs on a GPU through one of KERNELS also runs through its twins, where legal.
HOPPER: Dict[str, Dict[str, Any]] = {
    "hopper_tiled": {"family": "hopper_tiled", "pack_gqa": False},
    "hopper_tiled_gqa": {"family": "hopper_tiled", "pack_gqa": True},
    "hopper_tiled_gather": {"family": "hopper_tiled", "gather": "ahead"},
    "hopper_tiled_beside": {"family": "hopper_tiled", "gather": "beside", "split_kv": 1},
    "hopper_packed": {"family": "hopper_packed", "split_kv": 1},
    "hopper_packed_split3": {"family": "hopper_packed", "split_kv": 3},
}
TWINS = {name: [f"hopper_{name}"] for name in KERNELS}
TWINS["tiled"] += ["hopper_tiled_gather", "hopper_tiled_beside"]
REFERENCE = Mode("reference")
INTERPRETED = {
    name: Mode(f"{name}-interpreted", "cpu", {**plan, "tile": {"block_m": 16, "block_n": block_n, "num_stages": 1}})
    for (name, plan), block_n in zip(KERNELS.items(), (16, 16, 16, 32))
}
GPU = {name: Mode(f"{name}-gpu", "cuda", plan) for name, plan in {**KERNELS, **HOPPER}.items()}
BY_NAME = {mode.name: mode for mode in [REFERENCE, *INTERPRETED.values(), *GPU.values()]}


# What runs where a test does not name its kernels: the interpreter takes milliseconds a tile, a GPU seconds to compile.
USUALLY_INTERPRETED = ("tiled_gqa", "packed")
USUALLY_ON_GPU = ("tiled", "packed_split3")


def modes(*kernels: str, reference: bool = True, interpreted: bool = True, gpu: bool = True) -> List[Any]:
    """Parameters of ``mode``. kernels: names of KERNELS; if none is named, two of them each way."""
    params = [pytest.param("reference")] if reference else []
    if interpreted:
        params += [pytest.param(f"{name}-interpreted") for name in kernels or USUALLY_INTERPRETED]
    if gpu:
        named = [name for plain in kernels or USUALLY_ON_GPU for name in (plain, *TWINS[plain])]
        params += [pytest.param(f"{name}-gpu", marks=pytest.mark.gpu) for name in named]
    return params
