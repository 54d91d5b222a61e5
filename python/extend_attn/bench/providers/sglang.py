"""SGLang's Triton extend attention, from an installed sglang, with the tile of the published rule put in its place.

``sglang-legacy`` runs the tile from before the published tuning, ``sglang-tuned`` the one after it, and
``sglang-installed`` whatever the installed version chooses by itself. The kernel is SGLang's own each time; only the
tile that its host function looks up, and the ``num_stages`` of its launch, are exchanged for the length of a call.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Dict, Iterator, Optional, Tuple

from ..problems import Row
from .base import Device, Prepared, Provider, Skip, needs_gpu

if TYPE_CHECKING:
    import torch

    from ..data import Batch

MODULES = (
    "sglang.kernels.ops.attention.extend_attention",
    "sglang.srt.layers.attention.triton_ops.extend_attention",
)
LOOKUP = "_get_block_sizes_for_extend_attention"
KERNEL = "_fwd_kernel"


class Sglang(Provider):
    def __init__(self, tile: str) -> None:
        self.tile = tile
        self.name = f"sglang-{tile}"
        self.what = {
            "tuned": "SGLang's Triton kernel with the published tuned tile",
            "legacy": "SGLang's Triton kernel with the tile from before that tuning",
            "installed": "SGLang's Triton kernel with the tile that the installed version chooses",
        }[tile]

    def refuses(self, row: Row, device: Device) -> Optional[str]:
        if row.kv_dtype:
            return "it rounds queries and weights to fp8 beside an fp8 pool"
        return needs_gpu(device)

    def prepare(self, batch: Batch, plan: Optional[Any] = None) -> Prepared:
        import torch

        module = _module()
        row = batch.row
        if self.tile == "installed":
            sizes, stages = None, None
            looked_up = getattr(module, LOOKUP)(row.head_dim, row.head_dim_v)
            used: Dict[str, Any] = {"block_m": looked_up[3], "block_n": looked_up[4], "num_warps": looked_up[5]}
        else:
            sizes, stages = rule(row, torch.cuda.get_device_capability(batch.device), legacy=self.tile == "legacy")
            used = {"block_m": sizes[3], "block_n": sizes[4], "num_warps": sizes[5], "num_stages": stages}

        def call(i: int) -> None:
            module.extend_attention_fwd(*batch.arguments(i), sliding_window_size=batch.window)

        def run(i: int) -> torch.Tensor:
            with tile_of(module, sizes, stages):
                call(i)
            return batch.sets[i].o

        plan = {"tile": used, "source": f"sglang {self.tile}"}
        return Prepared(run=run, plan=plan, call=partial(call, 0) if sizes is None else None)

    def versions(self) -> Dict[str, str]:
        try:
            return {"sglang": import_module("sglang").__version__}
        except (ImportError, AttributeError):
            return {}


def rule(row: Row, capability: Tuple[int, int], *, legacy: bool) -> Tuple[tuple, int]:
    """(what SGLang's lookup returns, num_stages) by the published rule."""
    from extend_attn.plan import sglang_rule

    *sizes, num_stages = sglang_rule(
        row.head_dim, row.head_dim_v, capability=capability, batch_size=row.batch, max_len_extend=row.new_tokens,
        legacy=legacy,
    )  # fmt: skip
    return tuple(sizes), num_stages


@contextmanager
def tile_of(module: Any, sizes: Optional[tuple], num_stages: Optional[int]) -> Iterator[None]:
    """Exchange the module's tile lookup and its kernel's ``num_stages``; None leaves it as installed."""
    if sizes is None:
        yield
        return
    before = getattr(module, LOOKUP), getattr(module, KERNEL)
    setattr(module, LOOKUP, lambda head_dim_qk, head_dim_v: sizes)
    setattr(module, KERNEL, _Staged(before[1], num_stages))
    try:
        yield
    finally:
        setattr(module, LOOKUP, before[0])
        setattr(module, KERNEL, before[1])


class _Staged:
    """A Triton kernel whose launches all take one ``num_stages``."""

    def __init__(self, kernel: Any, num_stages: Optional[int]) -> None:
        self.kernel, self.num_stages = kernel, num_stages

    def __getitem__(self, grid: Any) -> Any:
        launch = self.kernel[grid]
        return lambda *args, **options: launch(*args, **{**options, "num_stages": self.num_stages})


def _module() -> Any:
    problems = []
    for name in MODULES:
        try:
            module = import_module(name)
        except Exception as error:  # an installed sglang may fail to import for many a reason of its own
            problems.append(f"{type(error).__name__}: {error}")
            continue
        missing = [part for part in ("extend_attention_fwd", LOOKUP, KERNEL) if not hasattr(module, part)]
        if not missing:
            return module
        problems.append(f"{name} has no {', '.join(missing)}")
    raise Skip(f"sglang: {problems[0]}")
