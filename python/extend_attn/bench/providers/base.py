"""What a provider of attention is to the bench: whether it can run a row here, and if so its calls.

Nothing of this folder imports torch or a peer before a provider is asked to prepare: listing costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple

from ..problems import Row

if TYPE_CHECKING:
    import torch

    from ..data import Batch

OWN = "extend_attn"  # the library's own provider name


class Skip(Exception):
    """This provider cannot run this row here; the text says why, for the reader of the table."""


@dataclass
class Prepared:
    """A provider's calls on a batch. Anything a real engine does once a step, not once a layer, is done before.

    run: computes set ``i`` and returns its output as the provider lays it out. rows: turns that into ``[T, Hq, D]``
    (outside the timing). plan: what decided the speed, as JSON: the tile, the page size, what was done beforehand.
    call: set 0 as an engine would call it, without what ``run`` adds for the bench; what the host bench times.
    """

    run: Callable[[int], Any]
    rows: Callable[[Any], torch.Tensor] = lambda out: out
    plan: Optional[Dict[str, Any]] = None
    problem: Optional[Dict[str, Any]] = None  # the library's own: what a measured table is keyed by
    call: Optional[Callable[[], Any]] = None
    other_lengths: Optional[Callable[[int], Callable[[], Any]]] = None  # the n-th call with lengths of its own
    keep: List[Any] = field(default_factory=list)  # what must outlive the calls


@dataclass(frozen=True)
class Device:
    """Facts about the machine that a skip may hang on; made without importing a peer."""

    type: str  # "cuda" or "cpu"
    name: str
    capability: Optional[Tuple[int, int]] = None


class Provider:
    """One implementation. A subclass is a file of this folder; ``name`` is what ``--providers`` and JSON call it."""

    name: str = ""
    what: str = ""

    def refuses(self, row: Row, device: Device) -> Optional[str]:
        """Why this row cannot run here by its shape or the device; None if it may. Needs no GPU, imports no peer."""
        return None

    def prepare(self, batch: Batch, plan: Optional[Any] = None) -> Prepared:
        """Import, load and plan. Raises Skip with the reason where the peer is absent or refuses."""
        raise NotImplementedError

    def versions(self) -> Dict[str, str]:
        """Versions of what this provider brings along, if it is installed."""
        return {}


def import_peer(module: str, package: str) -> Any:
    """A peer's module. Some compile, probe or import half of themselves; whatever stops them is the reason to show."""
    try:
        return import_module(module)
    except Exception as error:
        raise Skip(f"{package}: {type(error).__name__}: {error}") from None


def needs_gpu(device: Device) -> Optional[str]:
    return None if device.type == "cuda" else "needs a GPU"


def needs_plain(row: Row) -> Optional[str]:
    return None if row.plain else "peers are asked for batches of equal sequences without masks, fp8 or latent values"


def needs_no_prefix(row: Row) -> Optional[str]:
    return "takes no scattered prefix" if row.prefix else needs_plain(row)
