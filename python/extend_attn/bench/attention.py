"""``bench attention``: options, the order of a run, and what it prints and writes."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from typing import Any, Dict, List, Optional

from . import results
from .problems import NOMINAL, PUBLISHED, Ceilings, Row, floor, rows_named
from .providers import OWN, PROVIDERS, providers_named
from .providers.base import Device
from .report import number, plan_text, report, table
from .runner import Budget, WorkerProcess, compile_all, tasks_of
from .tuned import merge, winners

EPILOG = """\
Times are microseconds of one call; graph replay over rotated inputs is the one to compare by. Results are checked
against the reference before they are timed. --finding shows the published finding again: the tile from before the
tuning against the one after it, with this library's kernels (plan sglang-legacy, plan sglang) and with SGLang's own.
"""
FINDING_PLANS: List[Optional[Any]] = [None, "sglang-legacy", "sglang"]
FINDING_PROVIDERS = [OWN, "sglang-legacy", "sglang-tuned"]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m extend_attn bench", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("kind", nargs="?", default="attention", choices=["attention"], help="what to measure")
    what = p.add_argument_group("what to run")
    what.add_argument("--rows", help="names, or published, all, tiny; by commas (default: all; on a CPU: tiny)")
    what.add_argument("--shape", action="append", default=[], help="a row of your own: B,E,P,W or B,E,P,W,D,Hq,Hkv")
    what.add_argument("--providers", help="names, or all; by commas (default: see --list)")
    what.add_argument("--plan", action="append", help="a plan of the library: JSON or a selector's name (repeatable)")
    what.add_argument("--sweep", action="store_true", help="each of the 12 published candidate tiles")
    what.add_argument("--candidates", action="store_true", help="each legal candidate of the plan module")
    what.add_argument("--finding", action="store_true", help="legacy against tuned tile on the published rows")
    how = p.add_argument_group("how to run")
    how.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    how.add_argument("--timeout", type=float, default=60.0, help="seconds for one measurement, compilation included")
    how.add_argument("--budget", type=float, help="seconds after which no further measurement is started")
    how.add_argument("--jobs", type=int, help="processes that compile beforehand, side by side (default: 8 for sweeps)")
    out = p.add_argument_group("what comes out")
    out.add_argument("--out", help="write (and after each row rewrite) this JSON file")
    out.add_argument("--plot", help="write this PNG")
    out.add_argument("--table", help="write each row's fastest plan into this table of measured plans")
    out.add_argument("--read", help="measure nothing: report, and plot, this JSON file")
    out.add_argument("--list", action="store_true", help="show rows and providers, run nothing")
    out.add_argument("--dry-run", action="store_true", help="show what would be measured, run nothing")
    return p


def main(argv: Optional[List[str]] = None) -> int:
    """Returns 0; 1 if a measurement failed or a result was wrong; 2 for wrong usage."""
    options = parser().parse_args(argv)
    try:
        if options.list:
            print(listing())
            return 0
        if options.read:
            return _show(results.load(options.read), options.plot)
        rows = [*_rows(options), *map(Row.parse, options.shape)]
        own_list = options.finding and not options.providers
        providers = FINDING_PROVIDERS if own_list else providers_named(options.providers)
        plans = [plan_argument(text) for text in options.plan or []]
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    device = options.device or ("cuda" if options.dry_run or _has_gpu() else "cpu")
    if options.finding:
        plans = plans or FINDING_PLANS
    if options.dry_run:
        print(dry_run(rows, providers, plans, options))
        return 0
    if device == "cpu":
        print("bench: no GPU: the reference runs on the CPU, and times say nothing about the kernels", file=sys.stderr)
    command = "python -m extend_attn bench " + shlex.join(sys.argv[2:] if argv is None else argv)
    run = Run(options, device, command)
    with run.worker:
        data = run.everything(rows, providers, plans)
    status = _show(data, options.plot) if data else 1
    return status or int(run.failed)


class Run:
    """One run: a worker, the file it fills, and a line on standard error for each measurement."""

    def __init__(self, options: argparse.Namespace, device: str, command: str) -> None:
        self.options, self.device, self.command = options, device, command
        self.worker = WorkerProcess(device, limit_s=options.timeout)
        self.budget = Budget(options.budget)
        self.failed = False
        self.skipped: List[Dict[str, Any]] = []
        self.measured: List[Dict[str, Any]] = []  # the library's own answers with a time, as the table wants them
        self.started = time.monotonic()

    def everything(self, rows: List[Row], providers: List[str], plans: List[Any]) -> Dict[str, Any]:
        """Measure; the filled results file, {} if not even the machine could be asked."""
        facts = self.worker.ask({"op": "hello", "providers": providers})
        ceilings = self.worker.ask({"op": "ceilings"}) if "failed" not in facts else facts
        if "failed" in ceilings:
            print(f"bench: {ceilings['failed']}", file=sys.stderr)
            return {}
        data = results.new_file(
            device=facts["device"], versions=facts["versions"], command=self.command, ceilings=ceilings
        )
        data["skipped"] = self.skipped
        by_row = {row.name: self.plans_of(row, plans) for row in rows} if OWN in providers else {}
        tasks = tasks_of(rows, providers, by_row, OWN)
        jobs = self.options.jobs if self.options.jobs is not None else 8 * (len(tasks) > 40 and self.device != "cpu")
        if jobs > 1:
            self.say(f"compiling for {len(tasks)} measurements in {jobs} processes")
            compile_all([t for t in tasks if t["provider"] == OWN or "sglang" in t["provider"]], self.device, jobs,
                        self.options.timeout)  # fmt: skip
        for i, task in enumerate(tasks):
            self.measure(task, f"[{i + 1}/{len(tasks)}]", data)
            last_of_row = i + 1 == len(tasks) or tasks[i + 1]["row"] != task["row"]
            if self.options.out and last_of_row:
                results.save(data, self.options.out)
        if self.options.table and self.measured:
            best = winners(self.measured, data, facts["sm_count"])
            try:
                merge(self.options.table, facts["arch"], best)
                self.say(f"{len(best)} measured plans in {self.options.table}")
            except (OSError, ValueError) as error:
                self.failed = True
                self.say(str(error))
        return data

    def plans_of(self, row: Row, plans: List[Any]) -> List[Optional[Any]]:
        """The library's plans on a row: those of the command line, or of the sweep asked for, or its own choice."""
        if not (self.options.sweep or self.options.candidates):
            return plans or [None]
        answer = self.worker.ask(
            {"op": "plans", "row": row.to_json(), "which": "sweep" if self.options.sweep else "candidates"}
        )
        if "plans" not in answer:
            self.failed = True
            self.say(f"{row.name}: no plans: {answer.get('failed') or answer.get('skipped')}")
            return plans or [None]
        for plan, reason in answer["illegal"]:
            self.skip(row, OWN, plan, reason)
        return [*plans, *([None] if self.options.sweep else []), *answer["plans"]]

    def skip(self, row: Row, provider: str, plan: Any, reason: str) -> None:
        self.skipped.append({"row": row.name, "provider": provider, "reason": reason, "plan": plan})

    def measure(self, task: Dict[str, Any], count: str, data: Dict[str, Any]) -> None:
        row, provider = Row.from_json(task["row"]), task["provider"]
        if self.budget.spent():
            answer: Dict[str, Any] = {"skipped": f"the budget of {self.options.budget:g} s was spent"}
        else:
            answer = self.worker.ask(task)
        least = floor(row, Ceilings(**data["ceilings"]))
        if "skipped" not in answer and (answer.get("error") is not None or "failed" not in answer):
            data["results"].append(results.new_result(row.name, provider, least.us, answer))
        if answer.get("us_graph") and answer.get("problem") and "failed" not in answer:
            self.measured.append({name: answer[name] for name in ("problem", "plan", "us_graph")})
        reason = answer.get("skipped") or answer.get("failed")
        if reason:
            self.skip(row, provider, task["plan"], reason)
        self.failed = self.failed or "failed" in answer
        us = answer.get("us_graph") or answer.get("us_do_bench")
        said = reason or f"{number(us)} us (floor {number(least.us)}), {plan_text(answer.get('plan'))}"
        note = f" ({answer['note']})" if "note" in answer else ""
        self.say(f"{count} {row.name} {provider}: {said}{note}")

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.1f} s {text}", file=sys.stderr, flush=True)


def listing() -> str:
    """Rows with their floors at nominal ceilings, and providers."""
    from .problems import ROWS

    lines = []
    for row in ROWS.values():
        least = floor(row, NOMINAL)
        heads = f"{row.head_dim}, {row.num_q_heads}/{row.num_kv_heads}"
        lines.append([row.name, row.shape, heads, f"{row.bytes / 1e6:.1f}", f"{row.flops / 1e9:.1f}",
                      f"{number(least.us)} {least.bound}"])  # fmt: skip
    floors = f"floor at {NOMINAL.read_gbps:.0f} GB/s, {NOMINAL.matmul_tflops:.0f} TFLOP/s (us)"
    default = providers_named(None)
    return "\n\n".join(
        [
            table(["row", "B,new,prefix,W", "D, heads q/kv", "MB", "GFLOP", floors], lines, left=2),
            table(["provider", "what"], [[name + ("" if name in default else " *"), one.what]
                                         for name, one in PROVIDERS.items()], left=2),
            "* only when named: --providers NAME or --providers all",
        ]
    )  # fmt: skip


def dry_run(rows: List[Row], providers: List[str], plans: List[Any], options: argparse.Namespace) -> str:
    """What would be measured on a Hopper GPU, and what each row's shape rules out. Touches no device."""
    hopper = Device("cuda", "any Hopper GPU", (9, 0))
    lines = []
    for row in rows:
        for name in providers:
            reason = PROVIDERS[name].refuses(row, hopper)
            what = f"skipped: {reason}" if reason else "checked, then timed"
            if name == OWN and not reason:
                swept = ["12 tiles"] * options.sweep + ["all candidates"] * (options.candidates and not options.sweep)
                what += f", plans: {', '.join([json.dumps(plan) for plan in plans] + swept)}" if plans or swept else ""
            lines.append([row.name, name, what])
    return table(["row", "provider", "what would happen"], lines, left=3)


def _rows(options: argparse.Namespace) -> List[Row]:
    if options.rows is None and options.shape:
        return []
    if options.rows is None and options.finding:
        return list(PUBLISHED)
    return rows_named(options.rows, on_gpu=options.dry_run or options.device == "cuda" or _has_gpu())


def plan_argument(text: str) -> Any:
    """A plan of the command line: a JSON object, or a selector's name; ValueError for a broken object."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"plan: {text!r} is no JSON object: {error}") from None


def _has_gpu() -> bool:
    """Is there a GPU? Asked without importing torch: the worker does that, and it takes seconds."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return False
    return any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def _show(data: Dict[str, Any], plot_path: Optional[str]) -> int:
    print(report(data))
    if plot_path:
        from .plot import plot

        try:
            plot(data, plot_path)
        except (RuntimeError, ValueError) as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
    return 0
