"""What the Hopper families get by default, and where they are the default at all."""

from __future__ import annotations

from typing import Optional, Tuple

from ..problem import ELEMENT_SIZE, Problem, bucket
from .device import DeviceSpec
from .legality_hopper import (
    PACKED_ROWS_MAX,
    code_tiles,
    hopper_illegal,
    hopper_shared_memory,
    is_fp8,
    packed_blocks,
    packed_held,
    packed_held_max,
)
from .legality_hopper_tiled import (
    FP8_HEAD_DIM_MAX,
    ROWS,
    WARPS,
    gathered_bytes,
    latent,
    no_gather,
    no_gather_beside,
    shares_ring,
    tiled_blocks,
    tiled_items,
    tiled_parts,
    tiled_rows,
    v_is_k,
)
from .tile import BLOCK_M_MIN, BLOCK_MIN, STAGES_MAX, Plan, Tile

# Families that passed the contract tests on a GPU and were faster there than the plain ones; no other is a default.
PROVEN: Tuple[str, ...] = ("hopper_packed", "hopper_tiled")
# Up to this many new tokens a sequence hopper_packed and hopper_tiled were held against each other (docs/plans.md, the
# crossover: head dims 64 to 512, groups of 1 to 8, batches of 1 and 16); beyond it hopper_tiled is the default.
CROSSOVER_MAX_LEN_EXTEND = 64
# There the plain tiled family, which puts all heads of a group into one tile of 128 rows, beats both with groups of 8
# whose rows take more than two blocks of hopper_packed and up to two of those tiles: 16 sequences of 8000 tokens, 24
# new ones, head dim 128, on an H100: 171 us, hopper_tiled 251, hopper_packed 345.
PLAIN_GROUP, PLAIN_ROWS_MAX, PLAIN_HEAD_DIM_MAX = 8, 256, 256
# Where programs fill the GPU, the plain packed family is faster, too, for narrow heads, whose tiles of 64 keys pass too
# fast for the ring: measured with groups of one, in more than NARROW_WAVES waves (100 sequences of 131 tokens, 54 new
# ones: 51 us on an H200, 98) or, of up to 16 rows, NARROW_WAVES_FEW (67 of 3387, 15 new ones: 237 and 266; but 30 of
# 32, 12 new ones: 8.7 and 7.4); and for a few fp8 keys (78 of 34: 16.5 and 22.5).
NARROW_HEAD_DIM, NARROW_GROUP, NARROW_WAVES, NARROW_WAVES_FEW, PLAIN_FP8_KEYS = 64, 1, 1.5, 4, 128
FEW_TOKENS = FEW_ROWS = 16
PACKED_BLOCK_N = 64
# Registers that packed_held may name before a second consumer shares the rows. On an H200, us with one and two: 64 rows
# at head dim 128 (160) 75 and 69, at 64 (128) 61 and 56, 32 rows at 512 (176) 142 and 134; but 32 rows at 128 (80) 66.6
# and 67.1, at 256 (112) 128.9 and 129.4. fp8 codes need a second warpgroup of producers instead: 32 rows over 128 keys
# at 128 (128) take 118.8 and 135.2, other lengths 11.9 and 13.5, 104 and 120.
HELD_OF_ONE, HELD_OF_ONE_FP8 = 112, 128
# 16 rows at head dim 128 in more programs than a wave take 244.7 us with 128 keys a tile, 246.0 with 64 (32 sequences
# of 8000 tokens on an H200); 8 rows 244.9 and 243.3.
WIDE_BLOCK_N, WIDE_ROWS, WIDE_HEAD_DIM, WIDE_KEYS = 128, 16, 128, 4096
# fp8 codes are converted a tile at a time: wider tiles of small heads wait less often (64 sequences of 4000 tokens at
# head dim 128: 230 us on an H100, 267 with 64 keys), where a sequence has more than SHORT keys (78 of 34: 22.5 us on an
# H200 with 64 keys a tile, 29.9 with 128).
PACKED_BLOCK_N_FP8 = 128
SHORT = 256
# A block of half as many rows is faster, though keys are read twice, where they are few and the blocks still fit one
# wave: 2 sequences of 121 tokens and 32 rows take 4.2 us on an H200 with 16 rows a block, 4.9 with 32; 2 of 214 fp8
# tokens and 224 rows 8.3 with 32, 10.6 with 64; but 66 of 63 and 16 rows 16.3 with 8, 10.7 with 16. Above head dim 256
# also where they are more, or fill the GPU: 33 of 188 and 48 rows take 19.4 us with 32 rows a block, 25.7 with 64; 4 of
# 670 take 16.4 and 22.4; 2 of 1542 take 23.6 and, in as many splits, 32.2. Latent keys were not measured so.
LARGE_HEAD_DIM, HALF_BLOCK_KEYS, HALF_BLOCK_PROGRAMS = 256, 1024, 0.25
# Of a ring where two programs share a multiprocessor: three tiles of 64 keys at head dim 256. And where there is no
# more than one wave of programs: room for a second one would let a dependent launch pile its programs up on what is
# free. It is as good at head dim 256 for more programs, measured under windows of more than a few keys: 76 sequences of
# 1023 tokens take 85 us on an H200 so, 92 with the small ring.
RING_BYTES, RING_BYTES_OF_A_WAVE = 96 * 1024, 192 * 1024
DEEP_HEAD_DIM, DEEP_KEYS = 256, 512
STAGES_MIN = 3
# A ring is not deeper than its use: 50 sequences of 57 tokens at head dim 64 take 13.4 us with 4 slots, 14.2 with 8.
STAGES_SMALL, SMALL_HEAD_DIM, SMALL_HEAD_DIM_SHORT = 4, 64, 128
# Four slots of fp8 keys are faster than three where codes have places beside them (fp8_decode64 175 and 181 us on an
# H200), but beside 32 rows and more two: 14 sequences of 6978 tokens, 104 and 121 us.
STAGES_MIN_FP8, STAGES_FP8, STAGES_FP8_ROWS = 4, 2, 32
# Long prefixes without a window that fill about one wave are cut into even runs of keys, one a multiprocessor, since a
# host cannot know whether they are of one length: on an H100 32 sequences of 1 to 16000 tokens take 360 us so, 409 as
# they are; 32 of 8000 take 355 and 351. At head dim 128 it cost 3.5 % where lengths were equal. fp8 codes bind the
# multiprocessors, and so does a wave that is not full: 160 programs of 1780 keys take 38.9 us on an H200 so, 47.8 as
# they are; of few rows also 696 of 220 (34.0 and 40.1), and where splits leave multiprocessors free 72 of 6428 (44.3
# and 66.9) and 112 of 6978 (113 and 121), but 104 of 2032 not (43.6 and 39.2). Several blocks of one sequence's rows
# are evened out at any head dim, where they fill half of a wave or a little more than one: 6 sequences of 11900 tokens
# and 399 rows take 262 us so, 355 as they are, 3 of 2778 and 336 rows 36.6 and 43.7.
EVEN_MIN_KEYS, EVEN_MIN_HEAD_DIM = 2048, 256
EVEN_BLOCKS_MIN_KEYS, EVEN_BLOCKS_WAVES = 1024, 1.5
EVEN_MIN_KEYS_FP8, EVEN_MIN_KEYS_FP8_FEW_ROWS, EVEN_MIN_KEYS_FP8_ONE_WAVE = 1024, 192, 4096
FULL_WAVE = 0.9  # of the multiprocessors: one split
# Up to so much of a wave blocks of hopper_packed that read the keys again pay, which splits then share: 2 sequences of
# 7265 fp8 tokens, 53 new ones, would take 0.85 of one and 107 us on an H200, hopper_tiled 48.
FREE_WAVE = 0.5
# (largest head dim, keys of a share at least, of the first SPLITS_FEW shares, keys that splits must take off a longest
# share): a shorter share costs more in the merge than it saves, and the first splits pay down to fewer keys. On an H200
# 4654 keys take 8.0 us at head dim 128 in 16 splits, 10.6 in 9; 301 take 6.2 in one, 7.9 in 2; 493 take 7.6, 6.6 in 2
# and 5.4 in 4. At 256 1023 take 6.2 in 8, 11.6 in 2, but 8000 on an H100 17.1 in 16, 18.9 in 33. At 512 5666 take 11.7
# in 64, 12.5 in 32, 14.3 in 16; 278 take 7.1 in 4, 9.1 in one.
SPLIT_SHARES = ((128, 256, 128, 320), (256, 512, 128, 320), (1024, 96, 64, 192))
SPLITS_FEW = 8
SPLIT_MAX = 64
# Programs of narrow heads and few rows share a multiprocessor; where unsplit ones fill less than half of the GPU they
# are split for two waves: 3 sequences of 1312 tokens and 16 heads of 64 take 9.4 us on an H200 in 4 splits, 11.6 in 2.
# So are up to one wave of them with more keys: 8 of 3818 take 36 us in 2, 43 in one, but 7 of 709 11.8 and 9.8.
NARROW_SPLIT_WAVES, NARROW_SPLIT_FILLED, NARROW_SPLIT_KEYS = 2, 0.5, 2048
# Of hopper_tiled: key tiles of a part at least (1000 new tokens take 21.6 us on an H200 in 2 parts of 8, 24.6 in one),
# and parts at most.
MIN_SPLIT_TILES, TILED_SPLIT_MAX = 8, 16
# From this many new tokens on hopper_tiled takes two heads of a group over 64 tokens rather than 128 tokens of one:
# 383 against 390 us for 8192 tokens on an H100. So it does up to 64 new tokens, where the other consumer would have
# none (234 against 379 us for 32 behind 8000, 16 sequences, groups of 4), up to 256, of which the second block of 128
# often leaves half unused (96 prompts of 131: 74 us on an H200, 93 with one head; but 32 chunks of 512 take 143 and 114
# on an H100), above head dim 256 (9 chunks of 163: 37 and 54), and beside a mask, whose bytes the producer reads for 64
# tokens and not for 128 (4,2048 at head dim 256: 558 against 781 us).
PAIR_MIN_LEN_EXTEND, PAIR_FROM, PAIR_TO = 2048, 128, 256
# So it does for fp8 pools, whose codes are then converted once for two heads (36 chunks of 401 behind 4277 at head dim
# 128: 2473 us on an H200 and 2785; longer ones 1 to 2 %), and for chunks of up to 512 at head dims up to 128 that fill
# the GPU twice (39 of 276 behind 903: 486 and 617 us; but 1 of 311 behind 16300: 245 and 235).
PAIR_TO_NARROW, PAIR_NARROW_HEAD_DIM, PAIR_WAVES = 512, 128, 2
# Prompts of up to this many tokens take 64 keys a tile: 10 of 304 at head dim 128 38.0 us on an H200, 49.4 with 128; 4
# of 957 1.00 and 1.06, 6 of 1404 1.01 and 1.00.
SHORT_PROMPT = 1024
# And so do others behind short prefixes: 26 of 86 behind 302 56.8 and 66.7 us, 51 of 66 behind 429 1.00 and 1.04.
SHORT_PREFIX_TILED = 384
# Prefixes are gathered where so many blocks of 128 rows read each of their keys: on an H200, us without and ahead,
# fp8 at head dim 256 with 16 reads 313 and 239, 8 in splits 94 and 75, 4 151 and 166; at 128 with 32 609 and 467, 8 291
# and 283, 4 159 and 195. Of bf16 with 32 reads at head dim 64 386 and 360, at 128 503 and 484, at 512 664 and 639, but
# at 256 410 and 427; with 8 at 128 243 and 296. It takes memory of its own: no default takes more than GATHER_BYTES.
# Of narrow heads only fp8 is: models with layers of two kinds would compile more than twelve kernels. Codes of wider
# heads than BESIDE_HEAD_DIM are converted beside the walk: with 16 reads at head dim 256 227 us, 240 ahead, with 8 122
# and 136; but at 128 with 32 523 and 474.
GATHER_READS_FP8, GATHER_READS = 8, 32
BESIDE_HEAD_DIM = 128
GATHER_BYTES = 256 << 20
# Four consumers over 64 keys a tile, where registers hold that: prompts of 8192 at head dim 64 take 530 us on an H200,
# 571 with two; 16 chunks of 1024 206 and 228, 8 of 512 41 and 50. Under a window they walk what the others' rows see as
# well: 259 and 197 for 1024 keys of 8192.
FOUR_HEAD_DIM, FOUR_MIN_LEN_EXTEND = 64, 512


def preferred_hopper_plan(problem: Problem, device: DeviceSpec) -> Optional[Plan]:
    """The Hopper family's plan where one was measured to be faster than the plain families; None elsewhere."""
    if problem.batch_invariant:
        return None
    tiled = hopper_tiled_plan(problem, device)
    plans = [tiled]
    if problem.max_len_extend <= CROSSOVER_MAX_LEN_EXTEND:
        packed = hopper_packed_plan(problem, device)
        if _plain_is_faster(problem, packed, device):
            return None
        plans = [packed, tiled] if _packed_is_faster(problem, packed, tiled, device) else [tiled, packed]
    legal = (plan for plan in plans if plan.family in PROVEN and hopper_illegal(problem, plan, device) is None)
    return next(legal, None)


def _packed_is_faster(problem: Problem, packed: Plan, tiled: Plan, device: DeviceSpec) -> bool:
    """Whether hopper_packed goes before hopper_tiled: rows of a sequence and KV head fit one block, or its blocks leave
    multiprocessors to splits, or it reads the keys less often, or as often in even runs where heads do not pair, or
    there are none to read but the new ones.

    A few tokens without a prefix under a window, which serving does not ask for, run on the prompt's kernel (3 us more)
    rather than on one of their own."""
    if not problem.has_prefix:
        return problem.sliding_window <= 0 or problem.max_len_extend > FEW_TOKENS
    blocks = _row_blocks(problem, packed)
    leaves = FULL_WAVE if problem.prefix_hint <= SHORT else FREE_WAVE
    if problem.rows <= PACKED_ROWS_MAX or not _fills(problem, blocks, device, leaves):
        return True
    tokens, heads = (ROWS, 2) if tiled.pack_gqa else (tiled.tile.block_m, 1)
    slices = 1 if latent(problem) else tiled_blocks(problem)[3]
    reads = problem.group // heads * slices * -(-problem.max_len_extend // tokens)
    return blocks < reads or (blocks == reads and heads == 1 and packed.programs > 0)


def _plain_is_faster(problem: Problem, packed: Plan, device: DeviceSpec) -> bool:
    blocks = _row_blocks(problem, packed)
    if not _fills(problem, blocks, device):
        return False
    head_dim, rows = max(problem.head_dim_qk, problem.head_dim_v), problem.rows
    if is_fp8(problem) and problem.prefix_hint <= PLAIN_FP8_KEYS and problem.max_len_extend <= FEW_TOKENS:
        return True
    if head_dim <= NARROW_HEAD_DIM and problem.group == NARROW_GROUP and BLOCK_M_MIN < rows <= PACKED_ROWS_MAX:
        return _fills(problem, blocks, device, NARROW_WAVES_FEW if rows <= FEW_ROWS else NARROW_WAVES)
    tall = 2 * PACKED_ROWS_MAX < rows <= PLAIN_ROWS_MAX and problem.group == PLAIN_GROUP
    return tall and problem.has_prefix and head_dim <= PLAIN_HEAD_DIM_MAX


def _row_blocks(problem: Problem, packed: Plan) -> int:
    return -(-max(problem.rows, 1) // packed.tile.block_m)


def _fills(problem: Problem, blocks: int, device: DeviceSpec, share: float = FULL_WAVE) -> bool:
    """Whether so many row blocks of each sequence and KV head fill this share of the GPU without splits."""
    return max(problem.batch_size, 1) * problem.num_kv_heads * blocks >= share * device.sm_count


def hopper_packed_plan(problem: Problem, device: DeviceSpec) -> Plan:
    """Rows: new tokens times the heads of a group, in one tile as long as registers hold it."""
    block_d, _ = packed_blocks(problem)
    fp8, keys = is_fp8(problem), problem.prefix_hint
    block_n = PACKED_BLOCK_N_FP8 if fp8 and block_d <= 128 and keys > SHORT else PACKED_BLOCK_N
    tile = Tile(min(max(BLOCK_M_MIN, bucket(problem.rows)), PACKED_ROWS_MAX), block_n, 4, 2)
    if problem.has_prefix and tile.block_m > BLOCK_M_MIN and not v_is_k(problem):
        if _half_is_faster(problem, tile, device):
            tile = tile.merged({"block_m": tile.block_m // 2})
    while packed_held(problem, tile) > _held_well(problem, tile):  # a second consumer, then fewer rows
        tile = tile.merged({"num_warps": 8} if tile.num_warps == 4 else {"block_m": tile.block_m // 2, "num_warps": 4})
    programs = max(problem.batch_size, 1) * problem.num_kv_heads * -(-max(problem.rows, 1) // tile.block_m)
    wide = (tile.block_m, block_d) == (WIDE_ROWS, WIDE_HEAD_DIM) and keys >= WIDE_KEYS
    if wide and not fp8 and programs > device.sm_count:
        tile = tile.merged({"block_n": WIDE_BLOCK_N})
    split_kv = packed_splits(problem, device, programs)
    one_wave = problem.has_prefix and not fp8 and programs * split_kv <= device.sm_count
    even = split_kv == 1 and _even(problem, tile, one_wave, programs / device.sm_count)
    windowed = problem.has_prefix and problem.sliding_window > 0 and keys >= DEEP_KEYS
    deep = one_wave or (windowed and not fp8 and block_d == DEEP_HEAD_DIM)
    tile = tile.merged({"num_stages": _stages(problem, tile, deep, device)})
    shares = device.sm_count if even else 0
    return Plan("hopper_packed", tile, split_kv=split_kv, programs=shares, pdl=True, source="heuristic")


def _half_is_faster(problem: Problem, tile: Tile, device: DeviceSpec) -> bool:
    keys, large = problem.prefix_hint, problem.head_dim_qk > LARGE_HEAD_DIM
    if large and tile.block_m > BLOCK_MIN:
        few = not _fills(problem, -(-problem.rows // tile.block_m), device, HALF_BLOCK_PROGRAMS)
        return keys <= (2 * HALF_BLOCK_KEYS if few else HALF_BLOCK_KEYS)
    blocks = -(-problem.rows // (tile.block_m // 2))
    one_wave = max(problem.batch_size, 1) * problem.num_kv_heads * blocks <= device.sm_count
    return one_wave and problem.sliding_window <= 0 and keys <= (HALF_BLOCK_KEYS if large else SHORT)


def _held_well(problem: Problem, tile: Tile) -> int:
    """The most that ``packed_held`` may be where more consumers or fewer rows would not be faster."""
    most = packed_held_max(problem, tile)
    if tile.num_warps > 4:
        return most
    return min(HELD_OF_ONE_FP8 if is_fp8(problem) else HELD_OF_ONE, most)


def _stages(problem: Problem, tile: Tile, deep: bool, device: DeviceSpec) -> int:
    """Slots of the ring: what RING_BYTES hold, and no more than so few or so short keys use."""
    block_d, _ = packed_blocks(problem)
    slot = tile.block_n * block_d * ELEMENT_SIZE[problem.dtype]
    small = SMALL_HEAD_DIM_SHORT if problem.prefix_hint <= SHORT else SMALL_HEAD_DIM
    most = STAGES_SMALL if block_d <= small else STAGES_MAX
    if is_fp8(problem) and tile.block_m >= STAGES_FP8_ROWS:
        most = STAGES_FP8
    least = STAGES_MIN
    if code_tiles(problem, Plan("hopper_packed", tile.merged({"num_stages": STAGES_MIN_FP8}))) > 0:
        least = STAGES_MIN_FP8
    stages = min(max(least, (RING_BYTES_OF_A_WAVE if deep else RING_BYTES) // slot), most)
    while stages > 2 and _too_large(problem, tile, stages, device):
        stages -= 1
    return stages


def _even(problem: Problem, tile: Tile, one_wave: bool, waves: float) -> bool:
    """Whether even shares are worth it: the sequences' key lists are long, may be of any length, and bind as they are
    (one wave of programs, or for fp8 more than one)."""
    if problem.sliding_window > 0:
        return False
    if is_fp8(problem):
        least = EVEN_MIN_KEYS_FP8_FEW_ROWS if tile.block_m == BLOCK_M_MIN else EVEN_MIN_KEYS_FP8
        return problem.prefix_hint >= (least if waves > 1 else EVEN_MIN_KEYS_FP8_ONE_WAVE)
    if problem.rows > tile.block_m and (FREE_WAVE < waves < FULL_WAVE or 1 < waves <= EVEN_BLOCKS_WAVES):
        return problem.prefix_hint >= EVEN_BLOCKS_MIN_KEYS
    long = problem.num_kv_indices >= EVEN_MIN_KEYS * max(problem.batch_size, 1)
    return one_wave and long and problem.head_dim_qk >= EVEN_MIN_HEAD_DIM


def _too_large(problem: Problem, tile: Tile, stages: int, device: DeviceSpec) -> bool:
    plan = Plan("hopper_packed", tile.merged({"num_stages": stages}))
    return hopper_shared_memory(problem, plan) > device.shared_memory


def packed_splits(problem: Problem, device: DeviceSpec, programs: int) -> int:
    """How many share one sequence's keys: one where the ``programs`` that it takes unsplit fill the GPU, or where the
    others would take too few keys off it."""
    narrow = max(problem.head_dim_qk, problem.head_dim_v) <= NARROW_HEAD_DIM and problem.rows <= FEW_ROWS
    filled = 1.0 if problem.prefix_hint >= NARROW_SPLIT_KEYS else NARROW_SPLIT_FILLED
    waves = NARROW_SPLIT_WAVES if narrow and programs < filled * device.sm_count else 1
    if waves == 1 and programs >= FULL_WAVE * device.sm_count:
        return 1
    longest = problem.longest_prefix
    shortest, few, gain = next(rule[1:] for rule in SPLIT_SHARES if problem.head_dim_qk <= rule[0])
    most = max(longest // shortest, min(longest // few, SPLITS_FEW))
    splits = max(1, min(waves * device.sm_count // programs, SPLIT_MAX, most))
    return splits if problem.prefix_hint * (splits - 1) >= gain * splits else 1


def hopper_tiled_plan(problem: Problem, device: DeviceSpec) -> Plan:
    """128 keys a tile where registers hold their logits beside the accumulator; two heads a program if they pair.

    At head dim 256 keys and values of short blocks share a ring of three slots, which makes room for the next item's
    query: 126 against 135 us for 16 chunks of 1024 on an H200, but 364 against 354 for a prompt of 8192.
    """
    gather = _gather(problem)
    fp8 = is_fp8(problem) and not gather
    wide = problem.head_dim_qk <= (128 if fp8 else 192) and problem.head_dim_v <= 128 and not problem.custom_mask
    tile = Tile(tiled_rows(problem), 128 if wide else 64, 8, 2)
    narrow = max(problem.head_dim_qk, problem.head_dim_v) <= NARROW_HEAD_DIM
    if wide and _few_keys(problem):
        tile = tile.merged({"block_n": 64, "num_stages": 3})
    elif wide and narrow and not fp8:
        tile = tile.merged({"num_stages": 3})
    if problem.head_dim_qk > 256 and not latent(problem):
        tile = tile.merged({"num_stages": 1})  # one tile of keys is all that fits beside two query tiles
    pack = problem.group % 2 == 0 and not latent(problem) and _pairs(problem, device, fp8)
    if _four_consumers(problem, device):
        return Plan("hopper_tiled", Tile(4 * ROWS, 64, 4 * WARPS, 3), pdl=True, source="heuristic")
    split_kv = tiled_splits(problem, device, tile.block_n, pack)
    if gather == "beside" and no_gather_beside(problem, split_kv) is not None:
        gather = "ahead"
    # beside fp8 codes on their way there is no room for two tiles of each
    if fp8 or (split_kv == 1 and not (wide or problem.custom_mask or _long(problem))):
        one = Plan("hopper_tiled", tile.merged({"num_stages": 1}))
        tile = one.tile if shares_ring(problem, one) else tile
    return Plan("hopper_tiled", tile, split_kv=split_kv, pack_gqa=pack, pdl=True, gather=gather, source="heuristic")


def _gather(problem: Problem) -> str:
    """Whether and where the prefixes are gathered, for all blocks of rows that read them."""
    if no_gather(problem) is not None:
        return ""
    head_dim, fp8 = max(problem.head_dim_qk, problem.head_dim_v), is_fp8(problem)
    if fp8 and head_dim > FP8_HEAD_DIM_MAX:
        return "ahead"
    reads = problem.group * -(-problem.max_len_extend // (2 * ROWS))
    gains = NARROW_HEAD_DIM < head_dim <= 128 or head_dim > 256
    worth = reads >= GATHER_READS_FP8 if fp8 else gains and reads >= GATHER_READS
    if not worth or gathered_bytes(problem) > GATHER_BYTES:
        return ""
    return "beside" if fp8 and head_dim > BESIDE_HEAD_DIM else "ahead"


def _four_consumers(problem: Problem, device: DeviceSpec) -> bool:
    """Whether narrow heads' new tokens, with no keys but their own, fill the GPU in blocks of four consumers."""
    if max(problem.head_dim_qk, problem.head_dim_v) > FOUR_HEAD_DIM or problem.max_len_extend < FOUR_MIN_LEN_EXTEND:
        return False
    if problem.has_pool or problem.custom_mask or problem.sliding_window > 0:
        return False
    return tiled_items(problem, 1, 4 * ROWS) >= FULL_WAVE * device.sm_count


def _few_keys(problem: Problem) -> bool:
    """Whether a short prefix or window, or a short prompt's diagonal, leaves much of a tile of 128 keys unused."""
    if problem.has_prefix:
        few = problem.prefix_hint <= SHORT_PREFIX_TILED
    else:
        few = problem.max_len_extend <= SHORT_PROMPT and problem.is_causal and problem.head_dim_qk <= 128
    return few or 0 < problem.sliding_window <= SHORT


def _long(problem: Problem) -> bool:
    """Whether a block of rows is a whole prompt's: its queries and outputs then cost little beside its keys."""
    return problem.sliding_window <= 0 and _is_prompt(problem)


def _is_prompt(problem: Problem) -> bool:
    """Many new tokens, and no more before them."""
    return problem.max_len_extend >= PAIR_MIN_LEN_EXTEND and problem.prefix_hint <= problem.max_len_extend


def _pairs(problem: Problem, device: DeviceSpec, fp8: bool) -> bool:
    """Whether a program of hopper_tiled takes two heads of a KV head, if it can, and not two blocks of tokens."""
    tokens, head_dim = problem.max_len_extend, max(problem.head_dim_qk, problem.head_dim_v)
    if problem.custom_mask or head_dim > 256:
        return True
    if head_dim <= PAIR_NARROW_HEAD_DIM and problem.has_prefix:
        many = tiled_items(problem, 1, ROWS * 2) >= PAIR_WAVES * device.sm_count
        if fp8 or (many and PAIR_FROM < tokens <= PAIR_TO_NARROW):
            return True
    return tokens <= ROWS or PAIR_FROM < tokens <= PAIR_TO or _is_prompt(problem)


def tiled_splits(problem: Problem, device: DeviceSpec, block_n: int, pack: bool) -> int:
    """Parts of one block's keys: as many as fit one wave, and no shorter than what pays for the merge."""
    items = tiled_items(problem, 2 if pack else 1, ROWS if pack else tiled_rows(problem))
    longest = -(-(problem.prefix_hint + problem.max_len_extend) // block_n)
    return tiled_parts(problem, min(longest // MIN_SPLIT_TILES, TILED_SPLIT_MAX), items, device.sm_count)
