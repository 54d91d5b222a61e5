"""What the tiled Hopper family can run, and the shared memory that it takes."""

from __future__ import annotations

from typing import Optional, Tuple

from ..problem import ELEMENT_SIZE, Problem
from .blocks import next_power_of_2
from .device import DeviceSpec
from .tile import Plan

ROWS, WARPS = 64, 4  # of a consumer
CONSUMERS = (2, 4)  # of a program
MAX_ROWS = (1 << 30) - 1  # of a tensor that a ragged descriptor addresses
# (largest head dim, (columns of a slot of keys, slots a key)) and the same of values
KEY_BLOCKS = ((64, (64, 1)), (128, (128, 1)), (192, (64, 3)), (256, (256, 1)), (512, (128, 4)))
VALUE_BLOCKS = ((64, (64, 1)), (128, (128, 1)), (256, (256, 1)), (512, (256, 2)))
LATENT_VALUES, LATENT_REST = 512, 64  # columns of a latent key that are its value, and behind them
# By consumers: registers that hold logits, weights and accumulator, of 216 to 240 and of 112: with more loops spill.
HELD_MAX = {2: 176, 4: 80}
MASK_KEYS_MAX = 64  # keys of a tile: a mask's bytes take a register each from load to use
FP8_HEAD_DIM_MAX = 256
RING_SLOTS = 3  # of one ring for keys and values: two in use, one on its way
CODE_TILES = 3  # tiles of fp8 codes on their way: one is converted, two are copied
GATHERED_BYTES_MAX = 1 << 30  # of a call's gathered prefixes
BESIDE_BATCH_MAX = 128  # sequences among whose prefixes the next tile to convert is looked for
SHARED_MEMORY = 232448  # bytes of a block on sm_90
# Bytes of 50 MB of L2, and items (multiprocessors): 16 chunks of 1024 at head dim 256 take 144 us in one section on an
# H200, 133 in four; sections of half the size gain no more.
SECTION_BYTES, SECTION_ITEMS_MIN = 20 << 20, 132
BARRIERS = 1024  # bytes: mbarriers, work items, what warp specialisation passes on
LAYOUT_SCRATCH = 4096  # bytes: the output changes its layout on its way out, unless it leaves through the query's place


def _pool_v_is_k(problem: Problem) -> bool:
    return problem.v_aliases_k_pool or not problem.has_pool


def v_is_k(problem: Problem) -> bool:
    """Whether every V row lies in its K row, so that one read serves both (absorbed MLA)."""
    return _pool_v_is_k(problem) and (problem.unified or problem.v_aliases_k_new)


def latent(problem: Problem) -> bool:
    """Whether two consumers share rows and a key tile is read once, as keys and as values (tiled_latent.py)."""
    return _pool_v_is_k(problem) and LATENT_VALUES < problem.head_dim_qk <= LATENT_VALUES + LATENT_REST


def tiled_blocks(problem: Problem) -> Tuple[int, int, int, int]:
    """(columns of a slot of keys, slots a key, columns of a slot of values, slices of a value).

    Narrower heads are padded with zeros on their way into shared memory. Latent keys have LATENT_REST more columns.
    Zeros where there is no kernel.
    """
    if latent(problem):
        return (256, 2, 256, 2)
    keys = next((blocks for most, blocks in KEY_BLOCKS if problem.head_dim_qk <= most), None)
    values = next((blocks for most, blocks in VALUE_BLOCKS if problem.head_dim_v <= most), None)
    return (*keys, *values) if keys and values else (0, 0, 0, 0)


def tiled_rows(problem: Problem, consumers: int = 2) -> int:
    """Query rows of a program."""
    return ROWS if latent(problem) else consumers * ROWS


def tiled_items(problem: Problem, heads: int, tokens: int) -> int:
    """Work items at most: blocks of so many tokens of so many query heads, times slices of values."""
    blocks = max(problem.batch_size, 1) * -(-problem.max_len_extend // tokens)
    slices = 1 if latent(problem) else tiled_blocks(problem)[3]
    return blocks * problem.num_q_heads // heads * slices


def tiled_parts(problem: Problem, most: int, items: int, programs: int) -> int:
    """Parts, ``most`` at most, into which the keys of each of ``items`` are cut, so that all run at once: fewer where
    there are many items, none (1) where a window makes them short."""
    return 1 if problem.sliding_window > 0 else max(1, min(most, programs // max(items, 1)))


def tiled_illegal(problem: Problem, plan: Plan, device: DeviceSpec) -> Optional[str]:
    """Why the family's ``plan`` cannot run ``problem``, or None if it can."""
    tile = plan.tile
    consumers = tile.num_warps // WARPS
    rows = tiled_rows(problem, consumers)
    if tile.num_warps % WARPS or consumers not in CONSUMERS:
        return f"num_warps: {tile.num_warps}; two or four consumers of {WARPS} warps are 8 or 16"
    if tile.block_m != rows:
        return f"block_m: {tile.block_m}; the rows of {consumers} consumers are {rows}"
    if consumers > 2:
        reason = _takes_two(problem, plan)
        if reason:
            return f"num_warps: {tile.num_warps} are {consumers} consumers; {reason}"
    if tile.block_n not in (64, 128):
        return f"block_n: {tile.block_n}; allowed are 64 and 128"
    if plan.programs:
        return f"programs: {plan.programs}; only the packed family shares keys evenly"
    if plan.pack_gqa and latent(problem):
        return "pack_gqa: the two consumers share one head's rows where values are the front of latent keys"
    if plan.pack_gqa and problem.group % 2:
        return f"pack_gqa: two heads of a KV head share a program, and {problem.group} are odd"
    _, chunks, block_dv, _ = tiled_blocks(problem)
    if chunks == 0:
        widest = f"up to {LATENT_VALUES}, keys with all values at their front up to {LATENT_VALUES + LATENT_REST}"
        return f"head dims {problem.head_dim_qk}/{problem.head_dim_v}; keys and values have {widest} columns"
    held = tile.block_n * 3 // 4 + block_dv // 2  # fp32 logits, two tiles of 16-bit weights, fp32 accumulator
    if held > HELD_MAX[consumers]:
        most = HELD_MAX[consumers]
        return f"registers: {held} a thread for logits, weights and accumulator; there are {most} to hold them"
    if problem.custom_mask and tile.block_n > MASK_KEYS_MAX:
        return f"block_n: {tile.block_n}; beside a mask's bytes registers hold the logits of {MASK_KEYS_MAX} keys"
    reason = no_gather(problem) if plan.gather else None
    if plan.gather == "beside":
        reason = reason or no_gather_beside(problem, plan.split_kv)
    if reason:
        return f"gather: {reason}"
    reason = _not_served(problem, plan)
    if reason:
        return f"hopper_tiled: {reason}"
    needed = tiled_shared_memory(problem, plan)
    if needed > device.shared_memory:
        return f"shared memory: about {needed} bytes; a block on {device.arch} has {device.shared_memory}"
    return None


def _takes_two(problem: Problem, plan: Plan) -> Optional[str]:
    """Why no more than two consumers can run ``plan``, or None if more can."""
    if latent(problem):
        return "two share a tile's scores where values are the front of latent keys"
    if plan.pack_gqa:
        return "pack_gqa gives two one head each"
    if plan.split_kv > 1:
        return f"split_kv: {plan.split_kv}; blocks that leave programs to parts have two"
    if problem.has_pool or problem.custom_mask:
        return "a producer that gathers rows or reads a mask needs registers that only two leave it"
    if plan.tile.num_stages < 2:
        return "num_stages: 1; the first consumer skips up to three tiles of keys before it frees one of values"
    return None


def gathered_bytes(problem: Problem) -> int:
    """Device memory that the gathered prefixes of a call take."""
    dims = problem.head_dim_qk + problem.head_dim_v
    return problem.num_kv_indices * problem.num_kv_heads * dims * ELEMENT_SIZE[problem.dtype]


def no_gather(problem: Problem) -> Optional[str]:
    """Why the prefixes can't be gathered, or None if they can."""
    if not problem.has_pool:
        return "there is no prefix"
    if problem.unified:
        return "a unified call's list holds new tokens too"
    if latent(problem):
        return "values are the front of latent keys, which are read once as both"
    if problem.sliding_window > 0 or problem.mask_prefix:
        return "rows that no token sees, behind a window or a mask, would be read"
    if gathered_bytes(problem) > GATHERED_BYTES_MAX:
        return f"{gathered_bytes(problem)} bytes of prefixes; at most {GATHERED_BYTES_MAX} are kept"
    return None


def no_gather_beside(problem: Problem, split_kv: int) -> Optional[str]:
    """Why prefixes that can be gathered can't be beside the walk (tiled_copies.py), or None if they can."""
    if problem.kv_dtype == problem.dtype:
        return "beside the walk only codes are worth a conversion; rows of the query's type are copied ahead"
    if max(problem.head_dim_qk, problem.head_dim_v) > FP8_HEAD_DIM_MAX:
        return f"wider heads than {FP8_HEAD_DIM_MAX} leave no registers to convert beside them"
    if split_kv > 1:
        return f"beside split_kv {split_kv}: parts begin in the middle of a prefix, and all would wait for theirs"
    if problem.custom_mask:
        return "a mask's bytes are read by the warps that would convert"
    if problem.batch_size > BESIDE_BATCH_MAX:
        return f"{problem.batch_size} sequences; beside the walk at most {BESIDE_BATCH_MAX} are looked through"
    return None


def _not_served(problem: Problem, plan: Plan) -> Optional[str]:
    codes = problem.kv_dtype != problem.dtype and not plan.gather
    if codes and max(problem.head_dim_qk, problem.head_dim_v) > FP8_HEAD_DIM_MAX:
        return f"kv_dtype: {problem.kv_dtype} is converted up to head dim {FP8_HEAD_DIM_MAX}; wider, a KiB spills"
    if problem.num_tokens > MAX_ROWS:
        return f"num_tokens: {problem.num_tokens}; a descriptor addresses {MAX_ROWS} rows"
    return None


def shares_ring(problem: Problem, plan: Plan) -> bool:
    """Whether keys and values take turns in one ring of RING_SLOTS: where num_stages is 1 and their slots are alike."""
    columns, chunks, block_dv, slices = tiled_blocks(problem)
    return plan.tile.num_stages == 1 and (chunks, slices) == (1, 1) and columns == block_dv


def tiled_queries(problem: Problem, plan: Plan) -> int:
    """Query tiles a consumer: 2 if the next item's fit beside this one's, from whose place its output leaves then."""
    columns, chunks, block_dv, slices = tiled_blocks(problem)
    fits = _bytes(problem, plan, 2) <= SHARED_MEMORY and columns * chunks % block_dv == 0
    return 2 if fits and slices == 1 and plan.split_kv == 1 else 1


def code_columns(problem: Problem) -> int:
    """Columns of a staged row of an fp8 pool: what keys or values have, up to a power of two."""
    columns, chunks, block_dv, _ = tiled_blocks(problem)
    return max(next_power_of_2(columns * chunks), block_dv)


def tiled_sections(problem: Problem, items: int) -> int:
    """Sections in which the KV heads of ``items`` work items are gone through, so that the L2 holds a section's keys
    and values; each keeps all multiprocessors busy."""
    heads = problem.num_kv_heads
    rows = problem.num_kv_indices + (0 if problem.unified else problem.num_tokens)
    size = rows * heads * (problem.head_dim_qk + problem.head_dim_v) * ELEMENT_SIZE[problem.dtype]
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or items // n >= SECTION_ITEMS_MIN)]
    return next((n for n in fitting if size // n <= SECTION_BYTES), fitting[-1])


def tiled_shared_memory(problem: Problem, plan: Plan) -> int:
    """Bytes: query tiles, and ``num_stages`` tiles of keys and of values, or one ring."""
    return _bytes(problem, plan, tiled_queries(problem, plan))


def _bytes(problem: Problem, plan: Plan, queries: int) -> int:
    columns, chunks, block_dv, slices = tiled_blocks(problem)
    keys = columns * chunks
    scratch = 0 if slices > 1 or (queries > 1 and problem.out_dtype == problem.dtype) else LAYOUT_SCRATCH
    if problem.has_pool and problem.kv_dtype != problem.dtype and not plan.gather:
        scratch += CODE_TILES * plan.tile.block_n * code_columns(problem)
    if plan.gather == "beside":
        scratch += 2 * 4 * plan.tile.block_n  # slots
    if latent(problem):
        elements = (ROWS + plan.tile.num_stages * plan.tile.block_n) * (keys + LATENT_REST)
        elements += ROWS * plan.tile.block_n  # weights that consumers exchange
        return elements * ELEMENT_SIZE[problem.dtype] + 4 * 4 * ROWS + BARRIERS
    if shares_ring(problem, plan):
        elements = queries * plan.tile.block_m * keys + RING_SLOTS * plan.tile.block_n * keys
    else:
        elements = queries * plan.tile.block_m * keys + plan.tile.num_stages * plan.tile.block_n * (keys + block_dv)
    return elements * ELEMENT_SIZE[problem.dtype] + BARRIERS + scratch
