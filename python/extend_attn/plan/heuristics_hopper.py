"""What the Hopper families get by default, and where they are the default at all."""

from __future__ import annotations

from typing import Optional, Tuple

from ..problem import ELEMENT_SIZE, Problem, bucket
from .device import DeviceSpec
from .legality_hopper import (
    PACKED_ROWS_MAX,
    hopper_illegal,
    hopper_shared_memory,
    is_fp8,
    packed_blocks,
    packed_held,
    packed_held_max,
)
from .legality_hopper_tiled import ROWS, latent, shares_ring, tiled_blocks, tiled_rows
from .tile import BLOCK_M_MIN, STAGES_MAX, Plan, Tile

# Families that passed the contract tests on a GPU and were faster there than the plain ones; no other is a default.
PROVEN: Tuple[str, ...] = ("hopper_packed", "hopper_tiled")
# Up to this many new tokens a sequence hopper_packed is the default: the plain packed family's own limit.
HOPPER_PACKED_MAX_LEN_EXTEND = 16
# From this many on hopper_tiled is: below it a consumer's 64 rows are not full. Up to 64 must also go two heads to a
# program, or half of its rows are empty (32,64 after 2000 at head dim 128: 178 us with two heads, 335 with one, plain
# 208).
HOPPER_TILED_MIN_LEN_EXTEND = 64
PACKED_BLOCK_N = 64
# fp8 codes are converted a tile at a time: wider tiles of small heads wait less often (64 sequences of 4000 tokens at
# head dim 128: 230 us on an H100, 267 with 64 keys).
PACKED_BLOCK_N_FP8 = 128
# Of a ring where two programs share a multiprocessor: three tiles of 64 keys at head dim 256. And where there is no
# more than one wave of programs: room for a second one would let a dependent launch pile its programs up on what is
# free.
RING_BYTES, RING_BYTES_OF_A_WAVE = 96 * 1024, 192 * 1024
STAGES_MIN = 3
# Long prefixes without a window that fill about one wave are cut into even runs of keys, one a multiprocessor, since a
# host cannot know whether they are of one length: on an H100 32 sequences of 1 to 16000 tokens take 360 us so, 409 as
# they are; 32 of 8000 take 355 and 351. At head dim 128 it cost 3.5 % where lengths were equal.
EVEN_MIN_KEYS, EVEN_MIN_HEAD_DIM = 2048, 256
FULL_WAVE = 0.9  # of the multiprocessors: one split
# A shorter share costs more in the merge than it saves: 8000 keys take 17.1 us in 16 splits on an H100, 18.9 in 33.
MIN_SPLIT_KEYS = 512
SPLIT_MAX = 64
# Of hopper_tiled, whose parts are whole blocks of rows: 1000 new tokens in 3 splits of 5 tiles take 39 us on an H100,
# 27 in one; 512 after 8192 take 115 in 5 splits of 27, 196 in one.
MIN_SPLIT_TILES, TILED_SPLIT_MAX = 16, 16
# From this many new tokens on hopper_tiled takes two heads of a group over 64 tokens rather than 128 tokens of one:
# 383 against 390 us for 8192 tokens on an H100, but 143 against 114 for 32 chunks of 512.
PACK_MIN_LEN_EXTEND = 2048
# And up to this many, since the second 64 rows would be empty (32 trees of 64 nodes after 2000 tokens, head dim 128:
# 207 against 378 us), and beside a mask, whose bytes the producer reads for 64 tokens and not for 128 (4,2048 at head
# dim 256: 558 against 781 us).
PACK_MAX_LEN_EXTEND = ROWS


def preferred_hopper_plan(problem: Problem, device: DeviceSpec) -> Optional[Plan]:
    """The Hopper family's plan where one was measured to be faster than the plain families; None elsewhere."""
    if problem.batch_invariant:
        return None
    if problem.max_len_extend <= HOPPER_PACKED_MAX_LEN_EXTEND:
        plan = hopper_packed_plan(problem, device)
    elif problem.max_len_extend >= HOPPER_TILED_MIN_LEN_EXTEND and _fills_rows(problem):
        plan = hopper_tiled_plan(problem, device)
    else:
        return None
    return plan if plan.family in PROVEN and hopper_illegal(problem, plan, device) is None else None


def hopper_packed_plan(problem: Problem, device: DeviceSpec) -> Plan:
    """Rows: new tokens times the heads of a group, in one tile as long as registers hold it."""
    block_d, _ = packed_blocks(problem)
    fp8 = is_fp8(problem)
    block_n = PACKED_BLOCK_N_FP8 if fp8 and block_d <= 128 else PACKED_BLOCK_N
    tile = Tile(min(max(BLOCK_M_MIN, bucket(problem.rows)), PACKED_ROWS_MAX), block_n, 4, 2)
    while packed_held(problem, tile) > packed_held_max(problem, tile):  # a second warpgroup, then fewer rows
        tile = tile.merged({"num_warps": 8} if tile.num_warps == 4 else {"block_m": tile.block_m // 2, "num_warps": 4})
    programs = max(problem.batch_size, 1) * problem.num_kv_heads * -(-max(problem.rows, 1) // tile.block_m)
    split_kv = packed_splits(problem, device, programs)
    one_wave = problem.has_prefix and not fp8 and programs * split_kv <= device.sm_count
    even = split_kv == 1 and one_wave and _uneven(problem)
    slot = tile.block_n * block_d * ELEMENT_SIZE[problem.dtype]
    stages = min(max(STAGES_MIN, (RING_BYTES_OF_A_WAVE if one_wave else RING_BYTES) // slot), STAGES_MAX)
    while stages > 2 and _too_large(problem, tile, stages, device):
        stages -= 1
    tile = tile.merged({"num_stages": stages})
    shares = device.sm_count if even else 0
    return Plan("hopper_packed", tile, split_kv=split_kv, programs=shares, pdl=True, source="heuristic")


def _uneven(problem: Problem) -> bool:
    """Whether the sequences' key lists are long and may be of any length."""
    long = problem.num_kv_indices >= EVEN_MIN_KEYS * max(problem.batch_size, 1)
    return long and problem.sliding_window <= 0 and problem.head_dim_qk >= EVEN_MIN_HEAD_DIM


def _too_large(problem: Problem, tile: Tile, stages: int, device: DeviceSpec) -> bool:
    plan = Plan("hopper_packed", tile.merged({"num_stages": stages}))
    return hopper_shared_memory(problem, plan) > device.shared_memory


def packed_splits(problem: Problem, device: DeviceSpec, programs: int) -> int:
    """How many share one sequence's keys: one where the ``programs`` that it takes unsplit fill the GPU."""
    if programs >= FULL_WAVE * device.sm_count:
        return 1
    return max(1, min(device.sm_count // programs, SPLIT_MAX, problem.longest_prefix // MIN_SPLIT_KEYS))


def hopper_tiled_plan(problem: Problem, device: DeviceSpec) -> Plan:
    """128 keys a tile where registers hold their logits beside the accumulator; two heads a program if they pair.

    At head dim 256 keys and values of short blocks share a ring of three slots, which makes room for the next item's
    query: 126 against 135 us for 16 chunks of 1024 on an H200, but 364 against 354 for a prompt of 8192.
    """
    wide = problem.head_dim_qk <= 192 and problem.head_dim_v <= 128 and not (problem.custom_mask or is_fp8(problem))
    tile = Tile(tiled_rows(problem), 128 if wide else 64, 8, 2)
    if problem.head_dim_qk > 256 and not latent(problem):
        tile = tile.merged({"num_stages": 1})  # one tile of keys is all that fits beside two query tiles
    pack = _pairs(problem)
    split_kv = tiled_splits(problem, device, tile.block_n, pack)
    if split_kv == 1 and not (problem.custom_mask or is_fp8(problem) or _long(problem)):
        one = Plan("hopper_tiled", tile.merged({"num_stages": 1}))
        tile = one.tile if tile.block_n == 64 and shares_ring(problem, one) else tile
    return Plan("hopper_tiled", tile, split_kv=split_kv, pack_gqa=pack, pdl=split_kv > 1, source="heuristic")


def _long(problem: Problem) -> bool:
    """Whether a block of rows is a whole prompt's: its queries and outputs then cost little beside its keys."""
    return problem.sliding_window <= 0 and problem.max_len_extend >= PACK_MIN_LEN_EXTEND


def _fills_rows(problem: Problem) -> bool:
    """Whether hopper_tiled's programs have as many tokens as rows."""
    return problem.max_len_extend > ROWS or latent(problem) or _pairs(problem)


def _pairs(problem: Problem) -> bool:
    """Whether a program of hopper_tiled takes two heads of a KV head, and not two blocks of tokens."""
    fills = PACK_MAX_LEN_EXTEND < problem.max_len_extend < PACK_MIN_LEN_EXTEND and not problem.custom_mask
    return problem.group % 2 == 0 and not latent(problem) and not fills


def tiled_splits(problem: Problem, device: DeviceSpec, block_n: int, pack: bool) -> int:
    """Programs that share the keys of a block of rows: one if blocks fill the GPU, or a window makes them short."""
    if problem.sliding_window > 0:
        return 1
    tokens = ROWS if pack else tiled_rows(problem)
    blocks = -(-problem.max_len_extend // tokens)
    slices = 1 if latent(problem) else tiled_blocks(problem)[3]
    items = max(problem.batch_size, 1) * blocks * slices * problem.num_q_heads // (2 if pack else 1)
    most_tiles = -(-(problem.prefix_hint + problem.max_len_extend) // block_n)
    if items >= FULL_WAVE * device.sm_count or items == 0:
        return 1
    return max(1, min(device.sm_count // items, most_tiles // MIN_SPLIT_TILES, TILED_SPLIT_MAX))
