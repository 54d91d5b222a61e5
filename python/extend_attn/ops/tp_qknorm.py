"""``fused_parallel_qknorm``: RMS norm of q and k whose rows are sharded over the ranks."""

from __future__ import annotations

import torch

from ..comm.communicator import CustomAllReduce
from ..comm.names import DTYPE_NAMES

_NUMBERS = {getattr(torch, name): number for number, name in enumerate(DTYPE_NAMES)}


def fused_parallel_qknorm(
    comm: CustomAllReduce,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
) -> None:
    """In place, over the width of all shards: ``x * rsqrt(sum(x^2) / (width * world) + eps) * weight``, in fp32.

    ``q``, ``k``: ``[tokens, width]`` of this rank, one type (fp16, bf16, fp32), last dimension contiguous, base and row
    stride 16-byte aligned; 0 to 16384 tokens; widths in multiples of 8, q 128 to 8192, k 64 to 8192. ``q_weight``,
    ``k_weight``: ``[width]``, this rank's shard, of the same type. One kernel on the current stream: it pushes two sums
    a token to each of 2, 4 or 8 ranks. Counts as a call of ``comm``, in the same order on all ranks.
    """
    comm._require_open()
    for name, x in (("q", q), ("k", k)):
        _check(comm, name, x, q.dtype)
        if x.dim() != 2 or (x.shape[0] and x.stride(1) != 1):
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}, strides {x.stride()}; expected [tokens, width], rows contiguous"
            )
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"k: got {k.shape[0]} tokens; q has {q.shape[0]}")
    for name, weight, x in (("q_weight", q_weight, q), ("k_weight", k_weight, k)):
        _check(comm, name, weight, q.dtype)
        if weight.shape != x.shape[1:] or not weight.is_contiguous():
            raise ValueError(f"{name}: got shape {tuple(weight.shape)}; expected a contiguous [{x.shape[1]}]")
    if comm._core is None:
        raise NotImplementedError(
            f"comm: fused_parallel_qknorm needs the kernels, which can't run here: {comm._fallback_reason}"
        )
    if q.shape[0] == 0:
        comm._raise_if_poisoned()
        return
    _check_apart(q, k)
    if comm._capture is not None and torch.cuda.is_current_stream_capturing():
        comm._capture.note(("tp_qknorm", str(q.dtype), tuple(q.shape), k.shape[1], float(eps)))
    comm._run(
        comm._core.tp_qknorm,
        _NUMBERS[q.dtype],
        q.shape[0],
        q.data_ptr(),
        q.shape[1],
        q.stride(0),
        k.data_ptr(),
        k.shape[1],
        k.stride(0),
        q_weight.data_ptr(),
        k_weight.data_ptr(),
        float(eps),
    )


def _check(comm: CustomAllReduce, name: str, x: torch.Tensor, dtype: torch.dtype) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}; expected a tensor")
    if x.dtype not in comm.dtypes:
        raise TypeError(f"{name}: got {x.dtype}; this communicator was made with dtypes={comm.dtypes}")
    if x.dtype != dtype:
        raise TypeError(f"{name}: got {x.dtype}; q is {dtype}, and all four must have one type")
    if x.device != comm.device:
        raise ValueError(f"{name}: got a tensor on {x.device}; the communicator's device is {comm.device}")


def _check_apart(q: torch.Tensor, k: torch.Tensor) -> None:
    """q and k may be columns of one tensor; rows that overlap would be written twice."""
    size = q.element_size()
    q_first, k_first = q.data_ptr(), k.data_ptr()
    q_end = q_first + ((q.shape[0] - 1) * q.stride(0) + q.shape[1]) * size
    k_end = k_first + ((k.shape[0] - 1) * k.stride(0) + k.shape[1]) * size
    if q_end <= k_first or k_end <= q_first:
        return
    row = q.stride(0) * size
    if q.stride(0) == k.stride(0) and row:
        apart = (k_first - q_first) % row
        if apart >= q.shape[1] * size and apart + k.shape[1] * size <= row:
            return
    raise ValueError("k: overlaps q; both are written, so their rows must be apart")
