"""``CustomAllReduce``: the public communicator."""

from __future__ import annotations

import weakref
from typing import Any, Dict, List, NoReturn, Optional, Sequence, Set, Tuple, Union

import torch

from .capture import EXCHANGE, Capture, warn
from .errors import CommError, error_of, is_peer_lost, lost
from .names import ALGORITHMS, AUTO, DEFAULT_MAX_BYTES, DTYPE_NAMES, FALLBACK, MAX_RANKS, MIN_RANKS, VECTOR_BYTES
from .policy import Policy
from .rendezvous import GroupRendezvous
from .setup import Established, Options, Setup

_NUMBERS = {getattr(torch, name): number for number, name in enumerate(DTYPE_NAMES)}
_PULLS = ("one_shot_pull", "two_shot_pull")
_current_stream = torch._C._cuda_getCurrentRawStream if hasattr(torch._C, "_cuda_getCurrentRawStream") else None


class CustomAllReduce:
    """All-reduce over the GPUs of one host, for messages up to a few MiB, in CUDA graphs and out of them.

    ``group``: a torch.distributed process group of 2 to 8 ranks on one host (gloo will do; None is the default group);
    ``device``: this rank's GPU. Making one is collective. ``dtypes``: the types to build kernels for. ``max_bytes``:
    the largest message that is pulled. ``max_push_bytes``: the largest that is pushed, for which 2 x world times as
    much is allocated (None: the policy's threshold, at least what fused_parallel_qknorm needs). ``timeout_s``: how long
    a kernel waits for another rank. ``pdl``: programmatic dependent launch on sm_90 and later (None: unless
    EXTEND_ATTN_PDL=0). ``policy``: what ``algo="auto"`` means (None: ``Policy.load()``).

    All calls and replays of one communicator must come in the same order on all ranks, and one after the other on the
    GPU; an eager call waits for the eager call before it, whatever its stream. Use two communicators for what is to run
    at once.

    When a rank is not there within the timeout, or is in another call, the output is NaN, and the next call,
    ``check()`` or ``close()`` raises CommTimeout or CommDisagreement; every call raises until ``reset()`` on all ranks,
    or ``close()``.
    """

    def __init__(
        self,
        group: Any,
        device: Union[str, int, torch.device],
        *,
        dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
        max_bytes: int = DEFAULT_MAX_BYTES,
        max_push_bytes: Optional[int] = None,
        timeout_s: float = 30.0,
        pdl: Optional[bool] = None,
        policy: Optional[Policy] = None,
    ) -> None:
        options = Options.of(
            dtypes=dtypes,
            max_bytes=max_bytes,
            max_push_bytes=max_push_bytes,
            timeout_s=timeout_s,
            pdl=pdl,
            policy=policy,
        )
        self._begin(GroupRendezvous(group), torch.device(device), options)

    @classmethod
    def _of(cls, rendezvous: Any, device: torch.device, **arguments: Any) -> CustomAllReduce:
        """One rank whose peers are reached through ``rendezvous``; complete when all ranks are made."""
        self = cls.__new__(cls)
        self._begin(rendezvous, device, Options.of(**arguments))
        return self

    def _begin(self, rendezvous: Any, device: torch.device, options: Options) -> None:
        self._closed = True  # until the last step of the constructor
        if device.type != "cuda":
            raise ValueError(f"device: got {device}; a CUDA device is needed")
        if not MIN_RANKS <= rendezvous.world_size <= MAX_RANKS:
            raise ValueError(
                f"group: got {rendezvous.world_size} ranks; {MIN_RANKS} to {MAX_RANKS} are served "
                "(use torch.distributed.all_reduce for others)"
            )
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.rank: int = rendezvous.rank
        self.world_size: int = rendezvous.world_size
        self.dtypes = options.dtypes
        self.max_bytes = options.max_bytes
        self.timeout_s = options.timeout_s
        self._rendezvous = rendezvous
        self._policy = options.policy
        self._choices: Dict[Tuple[int, bool], str] = {}
        self._said: Set[str] = set()
        self._kept: Dict[int, torch.Tensor] = {}  # an input of each exported allocation
        self._capture: Optional[Capture] = None
        self._reported = False
        Setup(rendezvous, self.device, options, self._established).start()

    def _established(self, found: Established) -> None:
        self._core = found.core
        self._module = found.module
        self.link = found.link
        self.arch = found.arch
        self.max_push_bytes = found.max_push_bytes
        self._fallback_reason = found.reason
        self._closed = False
        if self._core is not None:
            self._finalizer = weakref.finalize(self, self._core.close)  # at interpreter exit, too

    # -- calls --

    def all_reduce(self, x: torch.Tensor, *, out: Optional[torch.Tensor] = None, algo: str = AUTO) -> torch.Tensor:
        """The sum of ``x`` over all ranks, on the current stream; the same bits on every rank and for every algorithm.

        ``x``: contiguous, 16-byte aligned, of one of ``dtypes``, any number of elements. ``out``: ``x`` itself or
        disjoint from it; None: a new tensor. ``algo``: one_shot_push, one_shot_pull, two_shot_pull, or auto (the
        policy's, and torch.distributed where the policy or the communicator's limits say so). Summed in fp32 in rank
        order from +0, so that a zero sum is +0.
        """
        self._require_open()
        self._check_tensor("x", x)
        if out is None:
            out = torch.empty_like(x)
        elif out is not x:
            self._check_out(out, x)
        if x.numel() == 0:
            self._raise_if_poisoned()
            return out
        capturing = torch.cuda.is_current_stream_capturing()
        chosen, reason = self._choose(x, algo, capturing)
        if chosen == FALLBACK:
            return self._fall_back(x, out, reason, capturing)
        slot, copy_in = -1, True
        if capturing and self._capture is not None:
            self._capture.note(("all_reduce", chosen, str(x.dtype), x.numel()))
            if chosen in _PULLS:
                slot, copy_in = self._capture.register(x)
        self._run(
            self._core.all_reduce,
            ALGORITHMS[chosen],
            _NUMBERS[x.dtype],
            x.numel(),
            x.data_ptr(),
            out.data_ptr(),
            slot,
            copy_in,
        )
        return out

    def can_reduce(self, x: torch.Tensor) -> bool:
        """Whether ``all_reduce(x)`` runs this library's kernels, now and as the current stream is."""
        if self._closed or self._core is None or not isinstance(x, torch.Tensor):
            return False
        if x.device != self.device or x.dtype not in self.dtypes or not x.is_contiguous():
            return False
        if x.numel() == 0 or x.data_ptr() % VECTOR_BYTES:
            return False
        return self._choose(x, AUTO, torch.cuda.is_current_stream_capturing())[0] != FALLBACK

    def capture(self) -> Capture:
        """A context manager around the capture of CUDA graphs with calls of this communicator; see Capture."""
        self._require_open()
        return Capture(self)

    @property
    def handle_exchanges(self) -> int:
        """How often ranks have told each other their captured inputs: once for each ``capture()`` that was left."""
        return self._rendezvous.made[EXCHANGE]

    def _run(self, launch: Any, *arguments: Any) -> None:
        """Launch on the current stream, unless poisoned."""
        if _current_stream is not None:
            stream = _current_stream(self.device.index)
        else:
            stream = torch.cuda.current_stream(self.device).cuda_stream
        try:
            launched = launch(stream, *arguments)
        except self._module.CudaError as error:
            self._raise_cuda(error)
        if not launched:
            self._raise_if_poisoned()

    def _check_tensor(self, name: str, x: torch.Tensor) -> None:
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}; expected a tensor")
        if x.dtype not in _NUMBERS:
            raise TypeError(f"{name}: got {x.dtype}; expected float16, bfloat16 or float32")
        if x.device != self.device:
            raise ValueError(f"{name}: got a tensor on {x.device}; this communicator's device is {self.device}")
        if not x.is_contiguous():
            raise ValueError(f"{name}: got strides {x.stride()} for shape {tuple(x.shape)}; it must be contiguous")

    def _check_out(self, out: torch.Tensor, x: torch.Tensor) -> None:
        self._check_tensor("out", out)
        if out.dtype != x.dtype or out.shape != x.shape:
            raise ValueError(f"out: got {out.dtype} {tuple(out.shape)}; x is {x.dtype} {tuple(x.shape)}")

    # -- the algorithm --

    def _choose(self, x: torch.Tensor, algo: str, capturing: bool) -> Tuple[str, str]:
        """(algorithm, why if it is the fallback): from size, type and capture state alone, so equal on all ranks."""
        nbytes = x.numel() * x.element_size()
        if algo != AUTO:
            if algo not in ALGORITHMS:
                raise ValueError(f"algo: got {algo!r}; expected {AUTO}, {', '.join(ALGORITHMS)}")
            if self._core is None:
                raise RuntimeError(f"algo: {algo} can't run: {self._fallback_reason}; use {AUTO!r}")
            if x.dtype not in self.dtypes:
                raise TypeError(f"x: got {x.dtype}; this communicator was made with dtypes={self.dtypes}")
            return algo, ""
        if self._core is None:
            return FALLBACK, str(self._fallback_reason)
        if x.dtype not in self.dtypes:
            return FALLBACK, f"the communicator was made without {x.dtype}"
        chosen = self._choices.get((nbytes, capturing))
        if chosen is None:
            chosen = self._choices[nbytes, capturing] = self._policy.choose(
                world_size=self.world_size,
                nbytes=nbytes,
                arch=self.arch,
                link=self.link,
                mode="graph" if capturing else "eager",
            ).algo
        if chosen == "one_shot_push" and nbytes > self.max_push_bytes:
            chosen = "one_shot_pull"  # a policy that came after the buffers
        if chosen in _PULLS and nbytes > self.max_bytes:
            return FALLBACK, f"{nbytes} bytes are more than max_bytes={self.max_bytes}"
        return chosen, f"the policy says so for {nbytes} bytes"

    def _fall_back(self, x: torch.Tensor, out: torch.Tensor, reason: str, capturing: bool) -> torch.Tensor:
        """torch.distributed.all_reduce, outside the promise about bits."""
        self._require_fallback(reason, capturing)
        if out is not x:
            out.copy_(x)
        import torch.distributed as dist

        dist.all_reduce(out, group=self._rendezvous.group)
        return out

    def _require_fallback(self, reason: str, capturing: bool) -> None:
        import torch.distributed as dist

        if self._rendezvous.virtual:
            raise ValueError(
                f"x: no kernel serves this call ({reason}), and virtual ranks have no torch.distributed to fall back to"
            )
        backend = str(dist.get_backend(self._rendezvous.group))
        if capturing and "nccl" not in backend:
            raise RuntimeError(
                f"under capture this needs torch.distributed ({reason}), whose backend {backend} can't be captured"
            )
        self._raise_if_poisoned()
        self._say_once(f"all-reduce by torch.distributed: {reason}")

    @property
    def policy(self) -> Policy:
        """What ``algo="auto"`` means. To replace it, assign on all ranks (collective; they compare it)."""
        return self._policy

    @policy.setter
    def policy(self, new: Policy) -> None:
        self._require_open()

        def follow(digests: List[str]) -> None:
            if len(set(digests)) > 1:
                raise CommError(
                    f"policy: ranks gave different ones ({', '.join(d[:12] for d in digests)}); the old one stays"
                )
            self._policy, self._choices = new, {}

        self._rendezvous.exchange("policy", new.digest(), follow)

    # -- errors --

    def check(self) -> None:
        """Waits for the GPU and raises what a call or replay on this rank has reported; not during a capture."""
        self._require_open()
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("check() waits for the GPU, which a capture forbids; call it outside")
        if self._core is None:
            return
        self._synchronize()
        self._raise_if_poisoned()

    def reset(self) -> None:
        """Makes a poisoned communicator as new. Collective: all ranks call it, with no call or replay in flight."""
        self._require_open()
        if self._core is None:
            return
        self._synchronize()
        self._rendezvous.exchange("reset", None, lambda _: self._reset())

    def _reset(self) -> None:
        try:
            self._core.reset()
        except self._module.CudaError as error:
            self._raise_cuda(error)
        self._reported = False
        self._rendezvous.exchange("reset: done", None, lambda _: None)

    def close(self) -> None:
        """Frees all; idempotent, not collective. Then raises what the GPU has reported and no call has raised."""
        if self._closed:
            return
        self._closed = True
        record = None if self._core is None or self._reported else self._core.error()
        if self._core is not None:
            self._finalizer()
        self._kept.clear()
        if record is not None:
            raise error_of(self.rank, record, self.timeout_s)

    def _synchronize(self) -> None:
        try:
            self._core.synchronize()
        except self._module.CudaError as error:
            self._raise_cuda(error)

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("the communicator is closed, or not all of its virtual ranks were made")

    def _raise_if_poisoned(self) -> None:
        record = None if self._core is None else self._core.error()
        if record is not None:
            self._reported = True
            raise error_of(self.rank, record, self.timeout_s)

    def _raise_cuda(self, error: Exception) -> NoReturn:
        if is_peer_lost(error):
            raise lost(self.rank, error) from error
        raise error

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warn(message)

    # -- captures --

    def _enter_capture(self, capture: Capture) -> None:
        self._require_open()
        if self._capture is not None:
            raise RuntimeError("capture(): already entered; one capture() may hold several graphs, but they don't nest")
        self._capture = capture

    def _leave_capture(self) -> None:
        self._capture = None

    def _export(self, address: int) -> Optional[Tuple[bytes, int, int]]:
        """(handle, offset, base) of memory that peers can map, else None."""
        return self._module.export_memory(address, self.device.index)
