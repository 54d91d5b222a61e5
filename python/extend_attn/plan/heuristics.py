"""What a problem gets by default where nothing was measured: few rules, each a named constant with its reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable, Dict, Optional, Sequence, Tuple

from ..problem import Problem
from .blocks import block_head_dim_v, next_power_of_2
from .device import DeviceSpec
from .heuristics_hopper import hopper_packed_plan, hopper_tiled_plan, preferred_hopper_plan
from .legality import no_tma
from .tile import Plan, Tile

# Up to this many new tokens a sequence is memory bound whatever its prefix: its keys should be read once a KV head.
PACKED_MAX_LEN_EXTEND = 16
# Up to this head dim as long as the rows fit one block: 100 sequences of 131 tokens, 54 new ones, take 51 us on an
# H200, 136 in the tiled family.
NARROW_HEAD_DIM = 64
# Elements of one K tile in the packed family where several programs share a multiprocessor: about 16 KB in 16 bit. One
# program a multiprocessor keeps twice that in flight. At 32 sequences of 8000 tokens and head dim 256, an H100 takes
# 358 us with 64 keys, 8 warps and one split (98 % of the bandwidth floor), 367 with 32 keys, 4 warps and two.
PACKED_TILE_ELEMENTS = 8192
PACKED_BLOCK_N_MAX = 128
# More packed rows than this become several row blocks (each reads K/V again). Large head dims keep fewer, because the
# accumulator of a row takes head_dim_v fp32 registers.
PACKED_BLOCK_M_MAX = 64
PACKED_BLOCK_M_MAX_LARGE = 32
LARGE_HEAD_DIM = 256
PACKED_STAGES = 3
PACKED_STAGES_128 = 4  # head dim 128: 366 us with 4 stages, 386 with 3 (64 sequences of 4000 tokens); 64: 279 and 237
# So few keys never fill a deeper pipeline. Of small heads and fp8 codes tiles of half as many keys and three stages are
# faster: 51 against 77 us for the 100 sequences above, 16.5 against 20.9 for 78 of 34 fp8 keys.
SHORT_PREFIX, SHORT_STAGES = 256, 2
# Accumulator registers a thread from which 4 warps spill and 8 do not (compiled for sm_90: 32 rows of 512 elements
# spill 228 bytes with 4 warps, none with 8; 16 of 512 and 32 of 256 fit 4).
ACCUMULATOR_REGISTERS_4_WARPS = 64

# Splits: none when the programs fill this share of the multiprocessors; otherwise enough for one wave (one sequence of
# 8000 tokens on an H100: 25.8 us with 16 splits, 20.9 with 32, 22.7 with 48, 25.0 with 64). Head dims above 256 fit one
# program a multiprocessor, so there a wave is not exceeded.
FULL_WAVE = 0.9
SPLIT_MAX = 64
LONG_PREFIX = 4096  # tokens
MIN_SPLIT_KEYS = 128  # shorter shares cost more in the combine than they save

# (largest head dim, tile) of the tiled family: few blocks, and enough for BIG_WAVES waves or a prefix to read. From
# sweeps on an H100. Head dim 256, causal: 1000 tokens 24.9 us (64 rows) and 41.2 (128); 16 x 1024 tokens 262 and 224;
# 4 x 1024 tokens after 4096 770 and 374, because two more loops make the small tile spill.
BIG_WAVES = 2.5
TILED_TILES = (
    (64, Tile(128, 64, 4, 3)),
    (128, Tile(128, 64, 8, 3)),
    (256, Tile(64, 64, 4, 3)),
)
TILED_TILES_BIG = (
    (64, Tile(128, 64, 4, 3)),
    (128, Tile(128, 128, 8, 3)),
    (256, Tile(128, 64, 8, 2)),
)
TILED_TILES_PREFIX = (
    (64, Tile(128, 64, 4, 3)),
    (128, Tile(128, 64, 8, 3)),
    (256, Tile(128, 64, 8, 2)),
)
TILED_TILE_LARGER = Tile(64, 32, 8, 2)

# The same for fp32, in both families: IEEE products run on the ordinary cores with operands in registers, so larger
# tiles spill by the kilobyte and take a minute to compile (sm_90, Triton 3.7). Packed, block_m is an upper bound.
FP32_TILES = (
    (64, Tile(32, 16, 4, 2)),
    (256, Tile(32, 16, 8, 2)),
)
FP32_TILE_LARGER = Tile(16, 16, 8, 2)


def plain_family(problem: Problem) -> str:
    """ "packed" for a few new tokens a sequence, "tiled" for more."""
    narrow = max(problem.head_dim_qk, problem.head_dim_v) <= NARROW_HEAD_DIM and problem.dtype != "float32"
    few = problem.max_len_extend <= PACKED_MAX_LEN_EXTEND or (narrow and problem.rows <= PACKED_BLOCK_M_MAX)
    return "packed" if few else "tiled"


def heuristic(problem: Problem, device: DeviceSpec, family_name: Optional[str] = None) -> Plan:
    """The preferred plan (of ``family_name``, if given), legal or not; plan/candidates.py makes it fit the device."""
    if family_name is None:
        preferred = preferred_hopper_plan(problem, device)
        if preferred is not None:
            return preferred
    name = family_name or plain_family(problem)
    return _PLANS[name](problem, device)


def packed_plan(problem: Problem, device: DeviceSpec) -> Plan:
    """Rows: new tokens times the heads of a group. Keys: about PACKED_TILE_ELEMENTS a tile."""
    head_dim = max(problem.head_dim_qk, problem.head_dim_v)
    if problem.dtype == "float32":
        tile = _by_head_dim(head_dim, FP32_TILES, FP32_TILE_LARGER)
        tile = replace(tile, block_m=min(problem.packed_rows, tile.block_m))
        split_kv = splits(problem, device, tile.block_m)
    else:
        most = PACKED_BLOCK_M_MAX if head_dim < LARGE_HEAD_DIM else PACKED_BLOCK_M_MAX_LARGE
        block_m = min(problem.packed_rows, most)
        split_kv = splits(problem, device, block_m)
        tile = _packed_tile(problem, device, head_dim, block_m, split_kv)
    pdl = split_kv > 1 and device.at_least(9)
    return Plan("packed", tile, split_kv=split_kv, pdl=pdl, source="heuristic")


def _packed_tile(problem: Problem, device: DeviceSpec, head_dim: int, block_m: int, split_kv: int) -> Tile:
    # 192, 288 and 576 count as 128, 256 and 512: they are cut into that block and a small rest
    dim = next_power_of_2(head_dim + 1) // 2
    block_n = min(max(16, PACKED_TILE_ELEMENTS // dim), PACKED_BLOCK_N_MAX)
    accumulator = block_m * block_head_dim_v(problem.head_dim_v, problem.head_dim_qk) // (4 * device.warp_size)
    num_warps = 4 if accumulator <= ACCUMULATOR_REGISTERS_4_WARPS else 8
    if problem.prefix_hint <= SHORT_PREFIX:
        if dim <= NARROW_HEAD_DIM or problem.kv_dtype != problem.dtype:
            return Tile(block_m, max(16, block_n // 2), num_warps, SHORT_STAGES + 1)
        return Tile(block_m, block_n, num_warps, SHORT_STAGES)
    if head_dim > LARGE_HEAD_DIM or (dim == LARGE_HEAD_DIM and split_kv == 1 and problem.kv_dtype == problem.dtype):
        return Tile(block_m, 2 * block_n, 8, PACKED_STAGES)  # one program a multiprocessor
    return Tile(block_m, block_n, num_warps, PACKED_STAGES_128 if dim == 128 else PACKED_STAGES)


def splits(problem: Problem, device: DeviceSpec, block_m: int) -> int:
    """Programs that share one sequence's keys, so that small batches fill the GPU once."""
    row_blocks = -(-max(problem.rows, 1) // block_m)
    programs = max(problem.batch_size, 1) * problem.num_kv_heads * row_blocks
    if programs >= FULL_WAVE * device.sm_count:
        # conversion of fp8 codes binds, not the memory: two programs a multiprocessor share it (493 to 312 us at 8k)
        return 2 if problem.kv_dtype != problem.dtype and problem.prefix_hint >= LONG_PREFIX else 1
    one_program = max(problem.head_dim_qk, problem.head_dim_v) > LARGE_HEAD_DIM
    wanted = device.sm_count // programs if one_program else -(-device.sm_count // programs)
    return max(1, min(wanted, SPLIT_MAX, problem.longest_prefix // MIN_SPLIT_KEYS))


def tiled_plan(problem: Problem, device: DeviceSpec) -> Plan:
    """By the larger head dim.

    A group's heads share a tile where a prefix is read, because its gather costs most, and at head dims above 256 (512,
    4096 tokens: 754 to 724 us). The new keys come through TMA
    where they can: on an H100 an 8192-token prefill at head dim 256 fell from 800 to 558 us, a 1000-token one from 32.4
    to 24.9 us. It serves tiles that need no mask, so a custom mask leaves it nothing to do.
    """
    head_dim = max(problem.head_dim_qk, problem.head_dim_v)
    if problem.dtype == "float32":
        tile = _by_head_dim(head_dim, FP32_TILES, FP32_TILE_LARGER)
    else:
        tiles = TILED_TILES_PREFIX if problem.has_prefix else TILED_TILES
        blocks = problem.batch_size * problem.num_q_heads * -(-problem.max_len_extend // 128)
        if not problem.has_prefix and blocks >= BIG_WAVES * device.sm_count:
            tiles = TILED_TILES_BIG
        tile = _by_head_dim(head_dim, tiles, TILED_TILE_LARGER)
    group = problem.group
    gain = problem.has_prefix or head_dim > LARGE_HEAD_DIM
    pack = gain and group > 1 and group & (group - 1) == 0 and group <= tile.block_m
    tma = problem.dtype != "float32" and not problem.custom_mask and no_tma(problem, device) is None
    return Plan("tiled", tile, pack_gqa=pack, tma=tma, source="heuristic")


_PLANS: Dict[str, Callable[[Problem, DeviceSpec], Plan]] = {
    "tiled": tiled_plan,
    "packed": packed_plan,
    "hopper_tiled": hopper_tiled_plan,
    "hopper_packed": hopper_packed_plan,
}


def _by_head_dim(head_dim: int, tiles: Sequence[Tuple[int, Tile]], larger: Tile) -> Tile:
    return next((tile for largest, tile in tiles if head_dim <= largest), larger)
