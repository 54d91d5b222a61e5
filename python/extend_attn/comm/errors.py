"""What can go wrong between ranks, and how a kernel's error record reads in words."""

from __future__ import annotations

from typing import Any, Mapping, Optional

from .names import ALGORITHMS, DTYPE_NAMES

_TIMEOUT, _DISAGREEMENT, _UNREGISTERED = 1, 2, 3
_TP_QKNORM = 4
_OPS = {number: name for name, number in ALGORITHMS.items()}


class CommError(RuntimeError):
    """A communicator can't go on: it raises on every call until ``reset()`` (on all ranks) or ``close()``."""


class CommDisagreement(CommError):
    """Two ranks were in different calls: another operation, algorithm, type or size."""


class CommTimeout(CommError):
    """A rank did not come to a call within the timeout."""


class PeerLost(CommError):
    """The driver failed on what a peer shared, or the process group did: as a rule, the peer's process has ended."""


# CUDA errors that a dead exporter's memory was seen to give; the context is lost with most of them.
_LOST = (
    "cudaErrorIllegalAddress",
    "cudaErrorLaunchFailure",
    "cudaErrorMapBufferObjectFailed",
    "cudaErrorECCUncorrectable",
    "cudaErrorNvlinkUncorrectable",
    "cudaErrorHardwareStackError",
    "cudaErrorContained",
    "cudaErrorUnknown",
    "cudaErrorInvalidResourceHandle",
    "cudaErrorMpsClientTerminated",
    "cudaErrorExternalDevice",
)


def is_peer_lost(error: BaseException) -> bool:
    """Whether a CUDA error is one that follows a peer's death."""
    return str(error).startswith(_LOST)


def describe_call(header: Mapping[str, Any]) -> str:
    """A header's fields as words: ``one_shot_push of 4096 bfloat16``."""
    dtype = dict(enumerate(DTYPE_NAMES)).get(header["dtype"], f"type {header['dtype']}")
    if header["op"] == _TP_QKNORM:
        return f"tp_qknorm of {header['tokens']} tokens, q {header['q_width']}, k {header['k_width']} {dtype}"
    op = _OPS.get(header["op"], f"operation {header['op']}")
    return f"{op} of {header['count']} {dtype}"


def error_of(rank: int, record: Mapping[str, Any], timeout_s: float) -> CommError:
    """The exception for a kernel's error record."""
    peer, mine, theirs = record["peer"], record["mine"], record["theirs"]
    where = f"rank {rank}, epoch {record['epoch']}, {describe_call(mine)}"
    remedy = "The output is NaN. Call reset() on all ranks, or close()."
    if record["failure"] == _DISAGREEMENT:
        what = describe_call(theirs)
        if what == describe_call(mine):
            what += f" with sequence number {theirs['sequence']}"
        return CommDisagreement(f"{where}: rank {peer} is in another call, {what}. {remedy}")
    if record["failure"] == _UNREGISTERED:
        return CommError(f"{where}: a graph was replayed whose capture() was never left without an error. {remedy}")
    return CommTimeout(f"{where}: nothing from rank {peer} within {timeout_s:g} s. {remedy}")


def lost(rank: int, error: BaseException, peer: Optional[int] = None) -> PeerLost:
    """``error`` of CUDA or the process group as PeerLost."""
    who = "a peer" if peer is None else f"rank {peer}"
    return PeerLost(
        f"rank {rank}: {who} seems to be gone: {error}. Close the communicator; a lost CUDA context needs a new process"
    )
