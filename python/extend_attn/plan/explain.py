"""Why a problem gets the plan it gets, as a table or as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

from ..problem import Problem
from .candidates import candidates
from .device import DeviceSpec
from .legality import illegal, shared_memory_bytes
from .select import PlanLike, TileLike, measured, select
from .sglang_rule import sglang_plan
from .tile import Plan


@dataclass(frozen=True)
class Considered:
    """One plan that was looked at: whether it can run, and if not, why; its estimated shared memory in bytes."""

    plan: Plan
    reason: Optional[str]
    shared_memory: int

    @property
    def legal(self) -> bool:
        """Whether the plan can run."""
        return self.reason is None

    @property
    def source(self) -> str:
        """Who proposed it: a table row, "heuristic", "sglang", "sglang-legacy" or "explicit"."""
        return self.plan.source


@dataclass(frozen=True)
class Explanation:
    """The plans considered for a problem, in order of preference, and the choice. ``str()`` is a table for people."""

    problem: Problem
    device: DeviceSpec
    rows: Tuple[Considered, ...]
    choice: Plan

    def to_json(self) -> Dict[str, Any]:
        """A dict of JSON types: problem, device, candidates (plan, legal, reason, source, shared_memory), choice."""
        return {
            "problem": self.problem.to_json(),
            "device": {
                "name": self.device.name,
                "arch": self.device.arch,
                "sm_count": self.device.sm_count,
                "shared_memory": self.device.shared_memory,
            },
            "candidates": [
                {
                    "plan": row.plan.to_json(),
                    "legal": row.legal,
                    "reason": row.reason,
                    "source": row.source,
                    "shared_memory": row.shared_memory,
                }
                for row in self.rows
            ],
            "choice": self.choice.to_json(),
        }

    def __str__(self) -> str:
        table = [("", "plan", "source", "shared memory", "")]
        chosen = next(row for row in self.rows if (row.plan, row.source) == (self.choice, self.choice.source))
        for row in self.rows:
            mark = "->" if row is chosen else ""
            verdict = "" if row.legal else f"no: {row.reason}"
            table.append((mark, str(row.plan), row.source, f"{row.shared_memory / 1024:.1f} KiB", verdict))
        widths = [max(len(line[column]) for line in table) for column in range(4)]
        device = self.device
        limits = f"{device.sm_count} SMs, {device.shared_memory // 1024} KiB of shared memory a block"
        lines = [f"problem  {describe(self.problem)}", f"device   {device.name} ({device.arch}, {limits})", ""]
        for line in table:
            padded = [cell.ljust(width) for cell, width in zip(line, widths)]
            lines.append("  ".join((*padded, line[4])).rstrip())
        return "\n".join((*lines, "", f"choice   {self.choice}  (source: {self.choice.source})"))


def explain(
    problem: Problem,
    device: DeviceSpec,
    *,
    plan: PlanLike = None,
    tile: TileLike = None,
    table: Optional[str] = None,
) -> Explanation:
    """What ``select`` with the same arguments looks at, and what it chooses. Raises what ``select`` raises."""
    choice = select(problem, device, plan=plan, tile=tile, table=table)
    if isinstance(plan, str) and plan.startswith("table:"):
        table = plan[len("table:") :]
    sized = problem.bucketed()  # what plans are chosen for; only SGLang's rule sees the true batch
    published = [sglang_plan(problem, device, legacy=legacy) for legacy in (False, True)]
    ours = [p for p in candidates(sized, device) if p.source == "heuristic"]
    considered: List[Plan] = [*measured(sized, device, table), *dict.fromkeys((*ours, *published))]
    if not any(choice == other and choice.source == other.source for other in considered):
        considered.insert(0, choice)
    rows = [Considered(p, illegal(sized, p, device), shared_memory_bytes(sized, p, device)) for p in considered]
    return Explanation(problem, device, tuple(rows), choice)


def describe(problem: Problem) -> str:
    """A problem in one line: what differs from the ordinary is named, what does not is left out."""
    p = problem
    head_dim = str(p.head_dim_qk) if p.head_dim_qk == p.head_dim_v else f"{p.head_dim_qk}/{p.head_dim_v}"
    other_types = [f" {what} {kind}" for what, kind in (("KV", p.kv_dtype), ("out", p.out_dtype)) if kind != p.dtype]
    parts = [
        "".join((p.dtype, *other_types)),
        f"head dim {head_dim}",
        f"heads {p.num_q_heads}/{p.num_kv_heads}",
        f"batch {p.batch_size}",
        f"new tokens <= {p.max_len_extend}",
        f"{p.num_kv_indices} indices" if p.num_kv_indices else "no prefix",
    ]
    if p.max_len_prefix is not None:
        parts.append(f"prefix <= {p.max_len_prefix}")
    if p.sliding_window > 0:
        parts.append(f"window {p.sliding_window}")
    if not p.is_causal:
        parts.append("not causal")
    flags = ("custom_mask", "mask_prefix", "window_offsets", "q_positions", "sinks", "return_lse", "unified")
    parts += [name for name in (*flags, "v_aliases_k_pool", "v_aliases_k_new", "batch_invariant") if getattr(p, name)]
    if p.logit_cap > 0:
        parts.append(f"cap {p.logit_cap:g}")
    if p.xai_temperature_len > 0:
        parts.append(f"temperature from {p.xai_temperature_len}")
    if p.alignment < 16:
        parts.append(f"aligned to {p.alignment} bytes")
    return ", ".join(parts)
