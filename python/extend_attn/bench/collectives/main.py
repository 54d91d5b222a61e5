"""The collective benches ``all-reduce``, ``qknorm``, ``step``, ``capture``, and ``collectives``: all four in one run.

Under torchrun, rank 0 starts and watches the ranks as processes of its own, so that one that hangs can be killed and
the run goes on; torchrun's other processes have nothing to do and end at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from typing import Any, Dict, List, Optional

from .. import results
from ..attention import _has_gpu
from . import tasks as kinds
from .arithmetic import sizes_named
from .report import report
from .run import Run, Settings

NAMES = {kind.replace("_", "-"): [kind] for kind in kinds.KINDS}
NAMES["collectives"] = list(kinds.KINDS)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m extend_attn bench", description=__doc__.splitlines()[0])
    p.add_argument("kind", choices=list(NAMES), help="what to measure")
    who = p.add_argument_group("the ranks")
    who.add_argument("--ranks", type=int, help="processes, one a GPU (default: torchrun's, else 2)")
    who.add_argument("--virtual-ranks", type=int, metavar="N", help="N ranks on one GPU in one process instead")
    who.add_argument("--device", choices=["cuda", "cpu"], help="cpu: gloo only, to try the bench out")
    what = p.add_argument_group("what to measure")
    what.add_argument("--sizes", help="bytes of all-reduces: 4KiB..64MiB, or 64KiB,1MiB (default: all)")
    what.add_argument("--tokens", help="of qknorm, or new tokens a sequence of step; by commas")
    what.add_argument("--batches", help="sequences of a step, by commas")
    what.add_argument("--graphs", help="numbers of graphs of capture, by commas")
    what.add_argument("--providers", help="extend_attn, nccl, symm_mem, gloo, none; by commas")
    what.add_argument("--algos", help="one_shot_push, auto, nccl, fused, ...; by commas")
    what.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    how = p.add_argument_group("how")
    how.add_argument("--timeout", type=float, default=30.0, help="seconds for one measurement (a step: 4 times that)")
    how.add_argument("--budget", type=float, help="seconds after which no further measurement is started")
    out = p.add_argument_group("what comes out")
    out.add_argument("--out", help="write this JSON file; with collectives the kind is put before the suffix")
    out.add_argument("--plot", help="draw all-reduces into this PNG")
    out.add_argument("--table", help="put the thresholds into this policy table, which auto then follows")
    out.add_argument("--read", help="measure nothing: report, draw, and write the table of, this JSON file")
    out.add_argument("--dry-run", action="store_true", help="say what would be measured")
    return p


def main(argv: Optional[List[str]] = None) -> int:
    """Returns 0; 1 if a measurement failed or a result was wrong; 2 for wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if int(os.environ.get("RANK", "0")) > 0:
        return 0  # torchrun's; rank 0 has started ranks of its own
    options = parser().parse_args(argv)
    try:
        if options.read:
            return _show({"": results.load(options.read)}, options)
        settings = settings_of(options)
        work = work_of(options, settings)
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        for tasks in work.values():
            print("\n".join(kinds.label(task) for task in tasks))
        return 0
    run = Run(settings, "python -m extend_attn bench " + shlex.join(argv))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the ranks end with this process
    try:
        with run.team:
            files = run.everything(work)
    finally:
        signal.signal(signal.SIGTERM, before)
    return _show(files, options) or int(run.failed)


def settings_of(options: argparse.Namespace) -> Settings:
    world = int(os.environ.get("WORLD_SIZE", "2"))
    if "WORLD_SIZE" in os.environ and world != int(os.environ.get("LOCAL_WORLD_SIZE", world)):
        raise ValueError("ranks: these collectives are for one host; WORLD_SIZE is not LOCAL_WORLD_SIZE")
    ranks = options.virtual_ranks or options.ranks or world
    if not 2 <= ranks <= 8:
        raise ValueError(f"ranks: got {ranks}; 2 to 8 can reduce")
    device = options.device or ("cuda" if _has_gpu() else "cpu")
    if device == "cpu" and options.virtual_ranks:
        raise ValueError("virtual-ranks: they need a GPU; without one, --device cpu tries the bench with gloo")
    return Settings(
        world=ranks,
        virtual=options.virtual_ranks is not None,
        device=device,
        dtype=options.dtype,
        timeout_s=options.timeout,
        budget_s=options.budget,
        out=options.out,
        table=options.table,
    )


def work_of(options: argparse.Namespace, settings: Settings) -> Dict[str, List[Dict[str, Any]]]:
    """kind -> its tasks. On a CPU the small ones."""
    gpu = settings.device == "cuda"
    every = {
        "all_reduce": kinds.all_reduce(sizes_named(options.sizes or (None if gpu else "4KiB,64KiB")), options.dtype),
        "qknorm": kinds.qknorm(_numbers(options.tokens) or (kinds.QKNORM_TOKENS if gpu else (1, 5))),
        "step": kinds.step(
            "gemma-4-26b-a4b" if gpu else "tiny",
            _numbers(options.batches) or (kinds.STEP_BATCHES if gpu else (2,)),
            (_numbers(options.tokens) if options.kind == "step" else None) or kinds.STEP_TOKENS,
            kinds.STEP_PREFIX if gpu else 16,
        ),
        "capture": kinds.capture(_numbers(options.graphs) or kinds.CAPTURE_GRAPHS),
    }
    filtered = {kind: every[kind] for kind in NAMES[options.kind]}
    if len(filtered) == 1:
        filtered = {k: kinds.chosen(tasks, options.providers, options.algos) for k, tasks in filtered.items()}
    elif options.providers or options.algos:
        raise ValueError("providers, algos: name one kind with them")
    return {kind: [{"dtype": options.dtype, **task} for task in tasks] for kind, tasks in filtered.items()}


def _numbers(text: Optional[str]) -> Optional[List[int]]:
    if text is None:
        return None
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise ValueError(f"expected whole numbers by commas, got {text!r}")
    return [int(part) for part in text.split(",")]


def _show(files: Dict[str, Dict[str, Any]], options: argparse.Namespace) -> int:
    """Print the reports; draw and write the table where asked for."""
    print("\n\n".join(report(data) for data in files.values()))
    for data in files.values():
        if data["kind"] != "all_reduce":
            continue
        try:
            if options.plot:
                from .plot import plot

                plot(data, options.plot)
            if options.read and options.table:
                from .table_rows import merge, rows_of

                merge(options.table, rows_of(data, arch=data["ceilings"]["arch"], link=data["ceilings"]["link"]))
        except (RuntimeError, ValueError, KeyError) as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
    return 0
