"""SGLang's published tile rule for its extend attention kernel, kept whole as one selector among others.

It is the yardstick: ``plan="sglang"`` runs this library's tiled kernel with the tile that the rule names, and
``plan="sglang-legacy"`` with the tile of the rule before it was tuned for head dims 129 to 256 on Hopper. The rule
looks at head dims and the GPU generation, and for Hopper at the batch; it knows nothing of prefixes, windows or types.

Where the published text and its code disagree, this is what is meant. The text reads as if the small tile (16, 64) were
the default for verification and a batch had to be shown to be small to lose it; the code asks for ``batch_size >= 8``,
so a caller that does not pass a batch size (0) keeps the tuned default, (32, 64) with 4 warps and 2 stages. The code is
followed: an unknown batch is not taken to be a large one.
"""

from __future__ import annotations

from typing import Tuple, Union

from ..problem import Problem
from .blocks import next_power_of_2
from .device import DeviceSpec
from .tile import Plan, Tile

Capability = Union[str, Tuple[int, int]]

# Head dims that are cut into a power of two and a rest instead of being padded: MLA's and its relatives.
SPLIT_HEAD_DIMS = {576: (512, 64), 288: (256, 32), 192: (128, 64)}
# The tuned Hopper case: at least this many sequences of at most this many new tokens each are a verification step.
VERIFY_MIN_BATCH, VERIFY_MAX_LEN_EXTEND = 8, 16


def sglang_rule(
    head_dim_qk: int,
    head_dim_v: int,
    *,
    capability: Capability,
    batch_size: int = 0,
    max_len_extend: int = 0,
    legacy: bool = False,
) -> Tuple[int, int, int, int, int, int, int]:
    """(BLOCK_DMODEL, BLOCK_DPE, BLOCK_DV, BLOCK_M, BLOCK_N, num_warps, num_stages) by the published rule.

    ``capability`` is (major, minor) or "hip". ``batch_size`` and ``max_len_extend`` 0 mean not known, and an unknown
    one keeps the tuned default. ``legacy`` gives the rule before tuning. Source: the function
    ``_get_block_sizes_for_extend_attention`` in SGLang's extend_attention.py, with the change that tuned Hopper for
    Gemma 4. ValueError for a capability that is neither.
    """
    block_dmodel, block_dpe = SPLIT_HEAD_DIMS.get(head_dim_qk, (next_power_of_2(head_dim_qk), 0))
    block_dv = next_power_of_2(head_dim_v)
    verify = batch_size >= VERIFY_MIN_BATCH and 0 < max_len_extend <= VERIFY_MAX_LEN_EXTEND
    return (block_dmodel, block_dpe, block_dv, *_tile(head_dim_qk, capability, verify, legacy))


def sglang_plan(problem: Problem, device: DeviceSpec, *, legacy: bool = False) -> Plan:
    """This library's tiled kernel, one head a tile, with the rule's tile; legal or not."""
    *_, block_m, block_n, num_warps, num_stages = sglang_rule(
        problem.head_dim_qk,
        problem.head_dim_v,
        capability=device.capability,
        batch_size=problem.batch_size,
        max_len_extend=problem.max_len_extend,
        legacy=legacy,
    )
    source = "sglang-legacy" if legacy else "sglang"
    return Plan("tiled", Tile(block_m, block_n, num_warps, num_stages), source=source)


def _tile(head_dim: int, capability: Capability, verify: bool, legacy: bool) -> Tuple[int, int, int, int]:
    if capability == "hip":
        return 64, 64, 4, 1
    if isinstance(capability, str) or len(capability) != 2:
        raise ValueError(f"capability: got {capability!r}; expected a pair (major, minor) or 'hip'")
    major, minor = capability
    num_warps = 4 if head_dim <= 64 else 8
    if major == 12:  # 99 KB of shared memory
        blocks = _by_head_dim(head_dim, (64, 128), (64, 64), (32, 32))
    elif major == 10:  # Hopper's blocks run out of registers here at large head dims
        blocks = _by_head_dim(head_dim, (64, 64), (64, 64), (16, 64))
    elif major >= 9:
        if 128 < head_dim <= 256 and not legacy:
            return (16, 64, 4, 2) if verify else (32, 64, 4, 2)
        blocks = _by_head_dim(head_dim, (128, 64), (128, 64), (32, 64))
    elif major == 8 and minor in (6, 9):  # 99 KB of shared memory
        blocks = _by_head_dim(head_dim, (64, 128), (64, 64), (32, 32))
    elif major == 8:
        blocks = _by_head_dim(head_dim, (128, 128), (64, 64), (32, 64))
    else:
        blocks = _by_head_dim(head_dim, (64, 64), (32, 32), (32, 32))
    return (*blocks, num_warps, 1)


def _by_head_dim(
    head_dim: int, to_128: Tuple[int, int], to_256: Tuple[int, int], larger: Tuple[int, int]
) -> Tuple[int, int]:
    return to_128 if head_dim <= 128 else to_256 if head_dim <= 256 else larger
