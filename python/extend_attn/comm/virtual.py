"""Several ranks on one GPU, in one process: the protocol and its kernels, without a second GPU."""

from __future__ import annotations

import os
import warnings
from typing import List, Optional, Sequence, Union

import torch

from .communicator import CustomAllReduce
from .names import DEFAULT_MAX_BYTES, DTYPE_NAMES, MAX_RANKS, MIN_RANKS
from .policy import Policy
from .rendezvous import Hub, VirtualRendezvous

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
# Streams that share a hardware queue run one after the other, and a rank would wait for one that is behind it.
ENOUGH_CONNECTIONS = 32
ALL_DTYPES = tuple(getattr(torch, name) for name in DTYPE_NAMES)


def virtual_ranks(
    world_size: int,
    device: Union[str, int, torch.device] = "cuda",
    *,
    dtypes: Sequence[torch.dtype] = ALL_DTYPES,
    max_bytes: int = DEFAULT_MAX_BYTES,
    max_push_bytes: Optional[int] = None,
    timeout_s: float = 30.0,
    pdl: Optional[bool] = None,
    policy: Optional[Policy] = None,
) -> List[CustomAllReduce]:
    """``world_size`` communicators on one GPU, rank r the r-th, each to be used on a stream of its own.

    A rank's kernel waits for the others', so between the launches of one call on all ranks there must be nothing that
    waits for the GPU: no synchronisation, no work on the default stream, no allocation (give ``out``). What ranks do
    together (leaving ``capture()``, ``reset()``, a new ``policy``) happens when the last of them calls. Set
    CUDA_DEVICE_MAX_CONNECTIONS=32 before CUDA starts; this does if it has not.
    """
    if not MIN_RANKS <= world_size <= MAX_RANKS:
        raise ValueError(f"world_size: got {world_size}; the kernels serve {MIN_RANKS} to {MAX_RANKS} ranks")
    if not torch.cuda.is_initialized():
        os.environ.setdefault(CONNECTIONS, str(ENOUGH_CONNECTIONS))
    if int(os.environ.get(CONNECTIONS, "8")) < world_size:
        warnings.warn(
            f"{CONNECTIONS} is {os.environ.get(CONNECTIONS, 'unset (8)')}: {world_size} streams may block each other; "
            f"set it to {ENOUGH_CONNECTIONS} before the process uses CUDA",
            RuntimeWarning,
            stacklevel=2,
        )
    hub = Hub(world_size)
    return [
        CustomAllReduce._of(
            VirtualRendezvous(hub, rank),
            torch.device(device),
            dtypes=dtypes,
            max_bytes=max_bytes,
            max_push_bytes=max_push_bytes,
            timeout_s=timeout_s,
            pdl=pdl,
            policy=policy,
        )
        for rank in range(world_size)
    ]
