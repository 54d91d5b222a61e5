"""Names of algorithms and types, and their numbers in csrc/."""

from __future__ import annotations

# Op in csrc/comm/header.h.
ALGORITHMS = {"one_shot_push": 1, "one_shot_pull": 2, "two_shot_pull": 3}
AUTO = "auto"
FALLBACK = "nccl"  # the policy's word for torch.distributed.all_reduce
# By number: DType in csrc/portability/selection.h.
DTYPE_NAMES = ("float16", "bfloat16", "float32")

MIN_RANKS, MAX_RANKS = 2, 8
VECTOR_BYTES = 16
# tp_qknorm pushes two floats a token.
QKNORM_MAX_TOKENS = 16384
QKNORM_BYTES = QKNORM_MAX_TOKENS * 8
DEFAULT_MAX_BYTES = 16 << 20
