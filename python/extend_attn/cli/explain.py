"""``python -m extend_attn explain``: an attention problem's plan, an all-reduce's algorithm, and who says so."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any, Dict, List, Optional, get_type_hints

from extend_attn.cli.render import format_table
from extend_attn.comm.policy import LINKS, MODES, Policy
from extend_attn.comm.sizes import format_bytes, parse_bytes
from extend_attn.problem import Problem
from extend_attn.selection import explain


def add_problem_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of Problem, under its own name; a flag that is not given is absent from the namespace."""
    hints = get_type_hints(Problem)
    group = parser.add_argument_group("problem", "fields of extend_attn.Problem; nine of them are needed, or --problem")
    for field in dataclasses.fields(Problem):
        flag = "--" + field.name.replace("_", "-")
        required = field.default is dataclasses.MISSING
        about = "needed" if required else f"default {field.default!r}"
        common: Dict[str, Any] = dict(dest=field.name, default=argparse.SUPPRESS)
        if hints[field.name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=about, **common)
        else:
            kind = hints[field.name] if hints[field.name] in (int, float, str) else int  # Optional[int]
            group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=about, **common)


def problem_from(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Problem:
    """The problem of ``--problem`` with the flags laid over it; wrong usage ends the program with status 2."""
    names = [field.name for field in dataclasses.fields(Problem)]
    given = {name: value for name, value in vars(args).items() if name in names}
    try:
        if args.problem is not None:
            return dataclasses.replace(Problem.from_json(read(args.problem)), **given)
        needed = [field.name for field in dataclasses.fields(Problem) if field.default is dataclasses.MISSING]
        missing = [name for name in needed if name not in given]
        if missing:
            parser.error("give --problem FILE, or also " + " ".join("--" + m.replace("_", "-") for m in missing))
        return Problem(**given)
    except (OSError, ValueError, TypeError, KeyError) as error:
        parser.error(str(error))


def read(path: str) -> str:
    """The text of a file; of standard input for ``-``."""
    if path == "-":
        return sys.stdin.read()
    with open(path, encoding="utf-8") as file:
        return file.read()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m extend_attn explain", description="Why a call gets the kernel that it gets. Needs no GPU."
    )
    what = parser.add_subparsers(dest="what", required=True, metavar="attention | all-reduce")
    attention = what.add_parser("attention", help="extend attention", description="Needs no GPU and no torch.")
    attention.add_argument("--problem", metavar="FILE", help="a Problem as JSON (Problem.to_json); - reads stdin")
    attention.add_argument("--device", help="h100, h200, sm_80, sm_90, ...; by default the GPU that is here")
    attention.add_argument("--plan", help="selector: sglang, sglang-legacy, heuristic, table:PATH")
    attention.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_problem_flags(attention)
    reduce = what.add_parser("all-reduce", help="the policy of algo=auto", description="Needs no GPU and no torch.")
    reduce.add_argument("--world-size", type=int, required=True, metavar="INT", help="ranks, 2 to 8")
    reduce.add_argument("--bytes", help="one message, such as 64KiB; without it all sizes")
    reduce.add_argument("--arch", default="sm_90", help="of the GPUs (default sm_90)")
    reduce.add_argument("--link", default="nvlink", choices=LINKS, help="between the GPUs (default nvlink)")
    reduce.add_argument("--mode", choices=MODES, help="one mode instead of both")
    reduce.add_argument("--table", metavar="FILE", help="a table before all others, as EXTEND_ATTN_ALL_REDUCE_TABLE")
    reduce.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def explain_all_reduce(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """A dict for each range of sizes (``above`` < bytes <= ``up_to``) and mode, or for the one size asked about."""
    policy = Policy.load(args.table)
    where = dict(world_size=args.world_size, arch=args.arch, link=args.link)
    found: List[Dict[str, Any]] = []
    for mode in [args.mode] if args.mode else MODES:
        if args.bytes:
            nbytes = parse_bytes(args.bytes)
            found.append({"mode": mode, "bytes": nbytes, **policy.choose(nbytes=nbytes, mode=mode, **where)._asdict()})
            continue
        thresholds, source = policy.thresholds(mode=mode, **where)
        above = 0
        for one in thresholds:
            found.append({"mode": mode, "above": above, "up_to": one.max_bytes, "algo": one.algo, "source": source})
            above = one.max_bytes or above
    return found


def _range(line: Dict[str, Any]) -> str:
    if "bytes" in line:
        return format_bytes(line["bytes"])
    return f"above {format_bytes(line['above'])}" if line["up_to"] is None else f"up to {format_bytes(line['up_to'])}"


def main(argv: Optional[List[str]] = None) -> int:
    """Returns 0, or 2 through argparse for a problem, device, table or size that cannot be."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.what == "all-reduce":
        try:
            lines = explain_all_reduce(args)
        except ValueError as error:
            parser.error(str(error))
        cells = [[line["mode"], _range(line), line["algo"], line["source"]] for line in lines]
        print(json.dumps(lines, indent=1) if args.json else format_table(["mode", "bytes", "algo", "source"], cells))
        return 0
    problem = problem_from(args, parser)
    try:
        explanation = explain(problem, args.device, plan=args.plan)
    except (ValueError, LookupError, RuntimeError) as error:
        parser.error(str(error))
    print(json.dumps(explanation.to_json(), indent=1) if args.json else explanation)
    return 0
