"""What a problem gets by default where nothing was measured: few rules, each a named constant with its reason."""

from __future__ import annotations

from typing import Optional

from ..problem import Problem
from .blocks import next_power_of_2
from .device import DeviceSpec
from .tile import Plan, Tile

# Up to this many new tokens a sequence is memory bound whatever its prefix: its keys should be read once a KV head.
PACKED_MAX_LEN_EXTEND = 16
# Elements of one K tile in the packed family. About 16 KB in 16 bit: enough bytes in flight with three stages, and a
# short window's edge wastes little.
PACKED_TILE_ELEMENTS = 8192
PACKED_BLOCK_N_MAX = 128
# More packed rows than this become several row blocks (each reads K/V again). Large head dims keep fewer, because the
# accumulator of a row takes head_dim_v fp32 registers.
PACKED_BLOCK_M_MAX = 64
PACKED_BLOCK_M_MAX_LARGE = 32
LARGE_HEAD_DIM = 256
PACKED_WARPS, PACKED_STAGES = 4, 3

# Splits: one wave of programs is enough when it fills this share of the multiprocessors; otherwise aim at this many
# waves.
FULL_WAVE = 0.9
SPLIT_WAVES = 2
SPLIT_MAX = 64
MIN_SPLIT_KEYS = 128  # shorter shares cost more in the combine than they save

# (largest head dim, tile) of the tiled family, from a sweep of a plain Triton kernel on an H100 at causal prefill.
TILED_TILES = (
    (64, Tile(128, 64, 4, 3)),
    (128, Tile(128, 64, 8, 3)),
    (256, Tile(64, 64, 4, 3)),
)
TILED_TILE_LARGER = Tile(64, 32, 8, 2)


def family(problem: Problem) -> str:
    """ "packed" for a few new tokens a sequence, "tiled" for more."""
    return "packed" if problem.max_len_extend <= PACKED_MAX_LEN_EXTEND else "tiled"


def heuristic(problem: Problem, device: DeviceSpec, family_name: Optional[str] = None) -> Plan:
    """The preferred plan (of ``family_name``, if given), legal or not; plan/candidates.py makes it fit the device."""
    name = family_name or family(problem)
    return packed_plan(problem, device) if name == "packed" else tiled_plan(problem)


def packed_plan(problem: Problem, device: DeviceSpec) -> Plan:
    """Rows: new tokens times the heads of a group. Keys: about PACKED_TILE_ELEMENTS a tile."""
    head_dim = max(problem.head_dim_qk, problem.head_dim_v)
    most = PACKED_BLOCK_M_MAX if head_dim < LARGE_HEAD_DIM else PACKED_BLOCK_M_MAX_LARGE
    block_m = min(max(16, next_power_of_2(max(problem.rows, 1))), most)
    # 192, 288 and 576 count as 128, 256 and 512: they are split into that block and a small rest
    dim = next_power_of_2(head_dim + 1) // 2
    block_n = min(max(16, PACKED_TILE_ELEMENTS // dim), PACKED_BLOCK_N_MAX)
    tile = Tile(block_m, block_n, PACKED_WARPS, PACKED_STAGES)
    return Plan("packed", tile, split_kv=splits(problem, device, block_m), source="heuristic")


def splits(problem: Problem, device: DeviceSpec, block_m: int) -> int:
    """Programs that share one sequence's keys, so that small batches fill the GPU for one to two waves."""
    row_blocks = -(-max(problem.rows, 1) // block_m)
    programs = max(problem.batch_size, 1) * problem.num_kv_heads * row_blocks
    if programs >= FULL_WAVE * device.sm_count:
        return 1
    wanted = -(-SPLIT_WAVES * device.sm_count // programs)
    keys = problem.num_kv_indices  # one sequence may own them all
    if problem.prefix_bound is not None:
        keys = min(keys, problem.prefix_bound)
    return max(1, min(wanted, SPLIT_MAX, keys // MIN_SPLIT_KEYS))


def tiled_plan(problem: Problem) -> Plan:
    """By the larger head dim; a group's heads share a tile where a prefix is read, because its gather costs most."""
    head_dim = max(problem.head_dim_qk, problem.head_dim_v)
    tile = next((tile for largest, tile in TILED_TILES if head_dim <= largest), TILED_TILE_LARGER)
    group = problem.group
    pack = problem.has_prefix and group > 1 and group & (group - 1) == 0 and group <= tile.block_m
    return Plan("tiled", tile, pack_gqa=pack, source="heuristic")
