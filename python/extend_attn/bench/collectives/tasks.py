"""What each kind of collective bench measures by default: one dict a task, as the ranks' workers take them.

A task's ``op`` names the measurement, and its other fields, with the answer's times, make the result. Imports no torch.
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence, Tuple

from ...comm.policy import OWN as OWN_ALGOS
from ..providers.base import OWN
from .arithmetic import ITEM_BYTES, KIB

KINDS = ("all_reduce", "qknorm", "step", "capture")
AUTO = "auto"
NONE = "none"

# (provider, algorithm) in the order of a run. gloo is NCCL's stand-in on a CPU.
ALL_REDUCE: Tuple[Tuple[str, str], ...] = (
    *((OWN, algo) for algo in OWN_ALGOS),
    ("nccl", "nccl"),
    ("symm_mem", "one_shot"),
    ("symm_mem", "two_shot"),
    ("gloo", "gloo"),
    (OWN, AUTO),
)
QKNORM = (
    (OWN, "fused"), (OWN, "two_all_reduces"), ("nccl", "two_all_reduces"), ("nccl", "all_gather"),
    ("gloo", "two_all_reduces"), ("gloo", "all_gather"),
)  # fmt: skip
STEP = ((OWN, AUTO), ("nccl", "nccl"), ("gloo", "gloo"), (NONE, NONE))
CAPTURE = ((NONE, NONE), ("nccl", "nccl"), (OWN, AUTO), *((OWN, algo) for algo in OWN_ALGOS[1:2]))

QKNORM_WIDTHS = (6144, 1024)  # of q and k over all ranks
QKNORM_TOKENS = (1, 4, 16, 64, 128, 512, 2048, 8192)
STEP_BATCHES = (1, 8, 32)  # sequences
STEP_TOKENS = (1, 4)  # new tokens a sequence: decode, and verification of 3 drafts
STEP_PREFIX = 1000
CAPTURE_GRAPHS = (1, 16, 64)
CAPTURE_COLLECTIVES = 60
CAPTURE_BYTES = 64 * KIB


def all_reduce(sizes: Sequence[int], dtype: str) -> List[Dict[str, Any]]:
    """Size by size; what ``auto`` chooses comes last, so that it can follow the thresholds of the same run."""
    tasks = [
        {"op": "all_reduce", "bytes": size - size % ITEM_BYTES[dtype], "provider": provider, "algo": algo}
        for size in sizes
        for provider, algo in ALL_REDUCE
    ]
    return sorted(tasks, key=lambda task: task["algo"] == AUTO)


def qknorm(tokens: Sequence[int]) -> List[Dict[str, Any]]:
    q_width, k_width = QKNORM_WIDTHS
    return [
        {"op": "qknorm", "tokens": count, "q_width": q_width, "k_width": k_width, "provider": provider, "algo": algo}
        for count in tokens
        for provider, algo in QKNORM
    ]


def step(model: str, batches: Sequence[int], tokens: Sequence[int], prefix: int) -> List[Dict[str, Any]]:
    slots = max(batches) * (prefix + max(tokens))  # of one pool for all batches
    return [
        {"op": "step", "model": model, "batch": batch, "tokens": new, "prefix": prefix, "slots": slots,
         "provider": provider, "algo": algo}
        for batch in batches
        for new in tokens
        for provider, algo in STEP
    ]  # fmt: skip


def capture(graphs: Sequence[int]) -> List[Dict[str, Any]]:
    return [
        {"op": "capture", "graphs": number, "collectives": CAPTURE_COLLECTIVES, "bytes": CAPTURE_BYTES,
         "provider": provider, "algo": algo}
        for number in graphs
        for provider, algo in CAPTURE
    ]  # fmt: skip


def chosen(tasks: List[Dict[str, Any]], providers: Optional[str], algos: Optional[str]) -> List[Dict[str, Any]]:
    """Those of the named providers and algorithms (by commas; None: all). ValueError names one that no task has."""
    for what, names in (("provider", providers), ("algo", algos)):
        if names is None:
            continue
        wanted = [name.strip() for name in names.split(",")]
        known = sorted({task[what] for task in tasks})
        for name in wanted:
            if name not in known:
                raise ValueError(f"{what}s: {name!r} is none of {', '.join(known)}")
        tasks = [task for task in tasks if task[what] in wanted]
    return tasks


def label(task: Dict[str, Any]) -> str:
    """A task in a few words, for the log."""
    facts = [f"{name} {task[name]}" for name in ("bytes", "batch", "tokens", "graphs") if name in task]
    return f"{task['op']} {', '.join(facts)}: {task['provider']} {task['algo']}"
