"""``bench host``: what one eager call costs the host, until it returns, beside the peers that are installed.

Small batches are bound by this before they are bound by the GPU. Calls are made in bursts that the launch queue holds,
so that nobody waits for the device; the result is checked first.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, Dict, List, Optional

from .attention import plan_argument
from .problems import Row, rows_named
from .providers import OWN, providers_named
from .report import plan_text, table
from .runner import WorkerProcess, tasks_of

ROWS = "verify_chat,one_verify,verify_burst,prefill_chat"
# SDPA without a backend's context is torch's own choice whatever the name says: once is enough.
DEFAULT_PROVIDERS = f"{OWN},sglang-installed,flashinfer-fa2,sdpa-cudnn"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m extend_attn bench host", description=__doc__)
    p.add_argument("--rows", default=ROWS, help=f"rows of bench attention, by commas (default: {ROWS})")
    p.add_argument("--providers", default=DEFAULT_PROVIDERS, help=f"by commas (default: {DEFAULT_PROVIDERS})")
    p.add_argument("--plan", action="append", help="a plan of the library: JSON or a selector's name (repeatable)")
    p.add_argument("--device", default="cuda", help="cuda or cpu")
    p.add_argument("--timeout", type=float, default=60.0, help="seconds for one measurement, compilation included")
    return p


def main(argv: Optional[List[str]] = None) -> int:
    """Returns 0; 1 if a measurement failed or a result was wrong; 2 for wrong usage."""
    options = parser().parse_args(argv)
    try:
        rows, providers = rows_named(options.rows), providers_named(options.providers)
        plans = [plan_argument(text) for text in options.plan or []] or [None]
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    lines: List[List[str]] = []
    skipped: List[str] = []
    failed = False
    with WorkerProcess(options.device, limit_s=options.timeout) as worker:
        facts = worker.ask({"op": "hello", "providers": providers})
        for task in tasks_of(rows, providers, {row.name: plans for row in rows}, OWN):
            row, provider = Row.from_json(task["row"]), task["provider"]
            answer = worker.ask({**task, "op": "host"})
            failed = failed or "failed" in answer
            reason = answer.get("skipped") or answer.get("failed")
            if reason:
                skipped.append(f"  {row.name} {provider}: {reason}")
            else:
                lines.append(line(row, provider, answer))
    print(f"{facts.get('device', '?')}, " + ", ".join(f"{k} {v}" for k, v in facts.get("versions", {}).items()))
    print(table(["row", "B,new,prefix,W", "provider", "us a call", "lengths not seen", "  plan"], lines, left=3))
    if skipped:
        print("skipped:\n" + "\n".join(skipped))
    return int(failed)


def line(row: Row, provider: str, answer: Dict[str, Any]) -> List[str]:
    other = answer.get("us_other_lengths")
    what = "torch's choice of backend" if provider.startswith("sdpa") else plan_text(answer["plan"])
    return [
        row.name,
        row.shape,
        provider,
        f"{answer['us_host']:.1f}",
        "" if other is None else f"{other:.1f}",
        "  " + what,
    ]
