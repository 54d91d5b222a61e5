"""The constructor: what ranks tell each other before they share memory, and whether they can at all.

Every step is an exchange, and an error of one rank ends it on all. A reason not to use the kernels (other hosts, no
peer access, EXTEND_ATTN_ALL_REDUCE=off) is seen by all ranks alike, and then all of them fall back to
torch.distributed.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch

from .. import __version__
from ..jit import load_comm_module
from .errors import CommError
from .names import DTYPE_NAMES, QKNORM_BYTES
from .policy import Policy

SWITCH = "EXTEND_ATTN_ALL_REDUCE"  # "off": torch.distributed does it all
PDL_SWITCH = "EXTEND_ATTN_PDL"  # "0": no programmatic dependent launch


@dataclass(frozen=True)
class Options:
    """The constructor's arguments, checked; sizes in bytes."""

    dtypes: Tuple[torch.dtype, ...]
    max_bytes: int
    max_push_bytes: Optional[int]
    timeout_s: float
    pdl: bool
    policy: Policy

    @classmethod
    def of(cls, *, dtypes, max_bytes, max_push_bytes, timeout_s, pdl, policy) -> Options:
        dtypes = tuple(dtypes)
        known = tuple(getattr(torch, name) for name in DTYPE_NAMES)
        if not dtypes or not set(dtypes) <= set(known):
            raise TypeError(f"dtypes: got {dtypes}; expected one or more of {', '.join(map(str, known))}")
        for name, value in (("max_bytes", max_bytes), ("max_push_bytes", max_push_bytes)):
            if value is not None and (not isinstance(value, int) or value < 16):
                raise ValueError(f"{name}: got {value!r}; expected a number of bytes, at least 16")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: got {timeout_s!r}; expected seconds above 0")
        if pdl is None:
            pdl = os.environ.get(PDL_SWITCH, "1") != "0"
        return cls(dtypes, max_bytes, max_push_bytes, float(timeout_s), bool(pdl), policy or Policy.load())


@dataclass
class Established:
    """What a constructor ends with: the module and this rank's communicator in it, or why there is none."""

    reason: Optional[str] = None
    module: Any = None
    core: Any = None
    link: str = ""
    arch: str = ""
    max_push_bytes: int = 0


def _host() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()


class Setup:
    """The steps in order; ``done(Established)`` is called at the end of the last."""

    def __init__(self, rendezvous: Any, device: torch.device, options: Options, done: Callable[[Established], None]):
        self._rendezvous = rendezvous
        self._device = device
        self._options = options
        self._done = done
        self._found = Established()
        self._uuids: List[str] = []

    def start(self) -> None:
        self._step("constructor", self._identity, self._agree)

    def _step(self, what: str, make: Callable[[], Any], then: Callable[[List[Any]], None]) -> None:
        value, error = None, None
        try:
            value = make()
        except Exception as caught:
            error = caught

        def follow(answers: List[Tuple[Optional[str], Any]]) -> None:
            failed = error is not None or any(text for text, _ in answers)
            if failed and self._found.core is not None:
                self._found.core.close()
            if error is not None:
                raise error
            for rank, (text, _) in enumerate(answers):
                if text:
                    raise CommError(f"rank {rank} failed in the constructor: {text}")
            then([answer for _, answer in answers])

        self._rendezvous.exchange(what, (error and f"{type(error).__name__}: {error}", value), follow)

    def _give_up(self, reason: str) -> None:
        if self._found.core is not None:
            self._found.core.close()
        self._done(Established(reason=reason))

    # 1. Who are we, and were we made alike?
    def _identity(self) -> Dict[str, Any]:
        o = self._options
        properties = torch.cuda.get_device_properties(self._device)
        self._found.arch = f"sm_{properties.major}{properties.minor}"
        alike = {
            "dtypes": sorted(map(str, o.dtypes)),
            "max_bytes": o.max_bytes,
            "max_push_bytes": o.max_push_bytes,
            "policy": o.policy.digest(),
            "version of extend_attn": __version__,
        }
        off = os.environ.get(SWITCH, "").lower() == "off"
        return {"alike": alike, "host": _host(), "uuid": str(properties.uuid), "arch": self._found.arch, "off": off}

    def _agree(self, ranks: List[Dict[str, Any]]) -> None:
        for name in ranks[0]["alike"]:
            values = [rank["alike"][name] for rank in ranks]
            if any(value != values[0] for value in values):
                listed = ", ".join(f"rank {r}: {value}" for r, value in enumerate(values))
                raise CommError(f"ranks were constructed with different {name} ({listed}); it must be the same on all")
        self._uuids = [rank["uuid"] for rank in ranks]
        self._found.arch = min(rank["arch"] for rank in ranks)  # one policy row for all
        if any(rank["off"] for rank in ranks):
            self._give_up(f"{SWITCH}=off")
        elif len({rank["host"] for rank in ranks}) > 1:
            self._give_up("the ranks are on different hosts")
        else:
            self._step("constructor: link", self._links, self._agree_on_link)

    # 2. How do the GPUs reach each other? The slowest pair counts.
    def _links(self) -> str:
        names = tuple(str(dtype).replace("torch.", "") for dtype in self._options.dtypes)
        major, minor = torch.cuda.get_device_capability(self._device)
        self._found.module = load_comm_module(archs=(f"{major}.{minor}",), dtypes=names)
        here = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
        links = {
            # A peer's GPU that CUDA_VISIBLE_DEVICES hides can't be asked about; whether it can be mapped shows later.
            self._found.module.link(self._device.index, here[uuid]) if uuid in here else "pcie"
            for rank, uuid in enumerate(self._uuids)
            if rank != self._rendezvous.rank
        }
        return next(link for link in ("none", "same-device", "pcie", "nvlink") if link in links)

    def _agree_on_link(self, links: List[str]) -> None:
        if "none" in links:
            self._give_up("the GPUs have no peer access to each other")
            return
        slowest = next(link for link in ("same-device", "pcie", "nvlink") if link in links)
        self._found.link = "virtual" if slowest == "same-device" else slowest
        self._step("constructor: workspace", self._workspace, self._connect)

    # 3. This rank's memory and kernels.
    def _workspace(self) -> Dict[str, Any]:
        o, found, world = self._options, self._found, self._rendezvous.world_size
        found.max_push_bytes = o.max_push_bytes or max(o.policy.push_limit(world, found.arch, found.link), QKNORM_BYTES)
        found.core = found.module.Communicator(
            rank=self._rendezvous.rank,
            world=world,
            device=self._device.index,
            max_bytes=o.max_bytes,
            max_push_bytes=found.max_push_bytes,
            timeout_ns=int(o.timeout_s * 1e9),
            pdl=o.pdl,
        )
        resident = min(found.core.load_kernels(DTYPE_NAMES.index(str(d).replace("torch.", ""))) for d in o.dtypes)
        if self._rendezvous.virtual:  # all ranks' blocks must be on the GPU at once; those of the next call may be, too
            return {"blocks": resident // (2 * world), "handle": b"", "address": found.core.address()}
        return {"blocks": resident, "handle": found.core.handle(), "address": 0}

    def _connect(self, ranks: List[Dict[str, Any]]) -> None:
        self._found.core.max_blocks = max(1, min(rank["blocks"] for rank in ranks))
        self._step("constructor: peers", lambda: self._open(ranks), self._probe)

    # 4. The peers' memory; 5. whether what is written there arrives.
    def _open(self, ranks: List[Dict[str, Any]]) -> str:
        core = self._found.core
        try:
            for peer, rank in enumerate(ranks):
                if peer != self._rendezvous.rank:
                    core.connect(peer, rank["handle"], rank["address"])
            core.write_probes()
        except self._found.module.CudaError as error:
            return f"the peers' memory can't be mapped: {error}"
        return ""

    def _probe(self, reasons: List[str]) -> None:
        if any(reasons):
            self._give_up(next(filter(None, reasons)))
        else:
            self._step("constructor: probe", self._found.core.check_probes, self._finish)

    def _finish(self, reasons: List[str]) -> None:
        if any(reasons):
            self._give_up(next(filter(None, reasons)))
        else:
            self._done(self._found)
