"""Compiles what the library would choose in each family, for every architecture and head dim, without a GPU.

    python tests/compile_matrix.py            a pairwise sample: every architecture and every head dim at least once
    python tests/compile_matrix.py --all      the whole product, with every set of features (about an hour on 2 cores)
    python tests/compile_matrix.py --arch 90  one architecture

For sm_90 the Hopper families are compiled too, with Triton 3.6 and later; they may spill next to nothing.

Each result must fit the shared memory that the architecture gives a block, on the Triton that tiles were chosen for at
once, on another after the steps down that a first call would make. With another Triton in a folder of its own
(``pip install --no-deps --target FOLDER triton==3.9.0``), put FOLDER first on PYTHONPATH. Exits 1 if anything fails.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Dict, Iterator, List, Tuple

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels can't be compiled

import triton
from compile_only import compile_plan

from extend_attn.plan import DeviceSpec, Plan, select, step_down
from extend_attn.problem import Problem

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TUNED_FOR = ("3.6.", "3.7.")  # where shared memory was compared with the estimate
KNOWN_TO_OLDEST = (80, 86, 89, 90)  # Triton 3.2
# (Dq, Dv, query heads, KV heads, V aliases K)
HEAD_DIMS = (
    (64, 64, 8, 2, False),
    (128, 128, 32, 8, False),
    (192, 128, 16, 16, False),
    (256, 256, 8, 4, False),
    (512, 512, 8, 2, False),
    (576, 512, 16, 1, True),
)
FEATURES: Dict[str, dict] = {
    "plain": dict(),
    "window": dict(sliding_window=1024, window_offsets=True, sinks=True, return_lse=True),
    "tree": dict(custom_mask=True, mask_prefix=True, q_positions=True, sliding_window=1024, logit_cap=30.0),
    "fp8": dict(kv_dtype="float8_e4m3fn", xai_temperature_len=4096),
    "unified": dict(unified=True, index_dtype="int32"),
}
PROMPT = "prompt"  # no key but the new ones
# An fp8 pool whose rows are converted once, ahead of hopper_tiled's walk or beside it; else they are in its producer.
GATHERED = ("ahead", "beside")
FEW = {"few": dict(batch_size=2)}  # so few blocks that hopper_tiled splits their keys
NEW_TOKENS = {"packed": 4, "tiled": 512}  # what each family is for
HOPPER = ("hopper_packed", "hopper_tiled")  # compiled for all of them, but for what hopper_tiled refuses: fp8 at 512
SPILLS_MAX = 176  # bytes a thread that a Hopper kernel may spill
SPILLS_MAX_LATENT = 480  # MLA's 64 rows of 512 columns in two consumers, outside the loop over keys; most beside fp8
# Of hopper_tiled by head dim, without and with a custom mask, whose bytes and places take a tile's registers; at 192
# and 256 an fp8 pool's smaller share of registers, at 512 all that goes on beside the loops over keys.
SPILLS_MAX_TILED = {
    64: (200, 640), 128: (320, 640), 192: (440, 760), 256: (640, 1440), 512: (320, 1760), 576: (640, 2048),
}  # fmt: skip

Job = Tuple[int, tuple, str, str]


def jobs(everything: bool) -> Iterator[Job]:
    """(architecture, head dim, family, features); the sample pairs each architecture with two head dims."""
    names = list(FEATURES)
    for a, arch in enumerate(ARCHITECTURES):
        if triton.__version__.startswith("3.2.") and arch not in KNOWN_TO_OLDEST:
            continue
        for d, dims in enumerate(HEAD_DIMS):
            if everything:
                yield from ((arch, dims, family, name) for family in NEW_TOKENS for name in names)
            elif (d - a) % 6 in (0, 3):
                family = "packed" if (d - a) % 6 == 0 else "tiled"
                yield arch, dims, family, names[(a + d) % len(names)]
            if arch == 90 and DeviceSpec.preset("sm_90").triton_at_least(3, 6):
                for family in HOPPER:
                    chosen = names if everything else [names[(d + i) % len(names)] for i in (0, 3)]
                    wide = family == "hopper_tiled" and dims[0] > 256
                    yield from ((arch, dims, family, name) for name in chosen if not (wide and name == "fp8"))
                    if family == "hopper_tiled" and (everything or dims[0] == 256):
                        yield arch, dims, family, "few"
                    if family == "hopper_tiled" and (everything or dims[0] in (128, 512)) and dims[0] <= 512:
                        yield arch, dims, family, "ahead"
                    if family == "hopper_tiled" and (everything or dims[0] == 256) and dims[0] <= 256:
                        yield arch, dims, family, "beside"
                yield arch, dims, "hopper_tiled", PROMPT


def problem_of(job: Job) -> Problem:
    arch, (dim, dim_v, heads, kv_heads, aliases), family, name = job
    features = dict({**FEATURES, **FEW, **dict.fromkeys(GATHERED, FEATURES["fp8"])}.get(name, {}))
    batch = features.pop("batch_size", 8)
    if features.get("kv_dtype") == "float8_e4m3fn" and arch < 89:
        features["kv_dtype"] = "float8_e5m2"  # the other type needs conversions that sm_89 brought
    new = NEW_TOKENS[family.replace("hopper_", "")]
    alias_new = aliases and not features.get("unified")
    return Problem(
        "bfloat16", dim, dim_v, heads, kv_heads, batch, batch * new, new, 0 if name == PROMPT else batch * 4000,
        v_aliases_k_pool=aliases, v_aliases_k_new=alias_new, **features,
    )  # fmt: skip


def shared_memory(problem: Problem, plan: Plan, arch: int) -> int:
    """Bytes that the hungriest kernel of a plan takes."""
    compiled = compile_plan(problem, plan, arch, resources=plan.hopper)
    if plan.hopper:
        spilled = max(kernel.spills for kernel in compiled)
        most = SPILLS_MAX_LATENT if problem.head_dim_qk > 512 else SPILLS_MAX
        if not plan.packed:
            most = SPILLS_MAX_TILED[problem.head_dim_qk][problem.custom_mask]
        assert spilled <= most, f"{plan} spills {spilled} bytes a thread; at most {most} are right"
    return max(kernel.shared_memory for kernel in compiled)


def compile_job(job: Job) -> str:
    """A line about the job, starting with ``ok`` or ``FAILED``."""
    arch, dims, family, name = job
    label = f"sm_{arch:<3} D={dims[0]}/{dims[1]} {family:13} {name:8}"
    try:
        problem = problem_of(job)
        device = DeviceSpec.preset(f"sm_{arch}")
        gather = {"gather": name if name in GATHERED else ""} if family == "hopper_tiled" else {}
        plan = select(problem, device, plan={"family": family, **gather})
        used = shared_memory(problem, plan, arch)
        while used > device.shared_memory and not triton.__version__.startswith(TUNED_FOR):
            print(f"{label} {plan} takes {used} bytes: steps down")
            plan = step_down(problem, plan, device)
            assert plan is not None, "nothing left to step down to"
            used = shared_memory(problem, plan, arch)
        assert used <= device.shared_memory, f"{plan} takes {used} bytes of shared memory of {device.shared_memory}"
    except Exception as error:
        return f"FAILED {label} {type(error).__name__}: {error}"
    return f"ok     {label} {plan}: {used} of {device.shared_memory} bytes"


def main(argv: List[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the whole product instead of the sample")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="only this architecture")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: the cores)")
    options = parser.parse_args(argv)
    chosen = [job for job in jobs(options.all) if options.arch is None or job[0] in options.arch]
    print(f"Triton {triton.__version__}: {len(chosen)} plans")
    failed = 0
    with ProcessPoolExecutor(min(options.jobs, len(chosen))) as pool:
        for line in pool.map(compile_job, chosen):
            print(line, flush=True)
            failed += not line.startswith("ok")
    print(f"{len(chosen) - failed} compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
