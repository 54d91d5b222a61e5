"""``python -m extend_attn tune``: measures plans for given problems and writes the fastest into a table.

Every plan's result is checked against the reference before it is timed. The choice of later runs follows the table:
by default it is the user's own, which goes before what ships with the package.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from typing import Any, Dict, List, Optional

from extend_attn.bench.problems import rows_named
from extend_attn.bench.tuning.crossover import crossover
from extend_attn.bench.tuning.evaluate import evaluate
from extend_attn.bench.tuning.tune import Limits, tune
from extend_attn.plan.tables import USER_FILE, user_folder, user_table_path
from extend_attn.problem import Problem

from .explain import add_problem_flags, problem_from, read

EPILOG = """\
examples:
  tune --problem problem.json                  one problem, as explain and Problem.to_json write it
  tune --problems layers.json --budget 600     a list of problems; again after the budget is spent: the ones left
  tune --model head_dim=256,num_q_heads=8,num_kv_heads=4,batch_sizes=1:32,max_len_extend=1:4:8192
                                               the problems of Problem.for_model with these arguments
  tune --rows all --table sm_90.json           the bench's rows: how the packaged table is made
  tune --evaluate 200 --seed 1                 random problems: how close the choice comes to the best of a sweep
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m extend_attn tune", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measures the legal plans of problems on the GPU and keeps the fastest.",
    )  # fmt: skip
    what = parser.add_argument_group("what to measure (else: the problem of the flags below)")
    what.add_argument("--problem", metavar="FILE", help="a Problem as JSON; - reads stdin; flags change its fields")
    what.add_argument("--problems", metavar="FILE", action="append", default=[], help="a JSON list (repeatable)")
    what.add_argument("--model", metavar="NAME=VALUE,...", help="arguments of Problem.for_model; lists as 1:4:8192")
    what.add_argument("--rows", help="rows of the attention bench: names, published or all, by commas")
    what.add_argument("--evaluate", metavar="N", type=int, help="sweep N random problems")
    what.add_argument("--crossover", action="store_true", help="families compared from 8 to 64 new tokens")
    what.add_argument("--seed", type=int, default=0, help="of the random problems (default 0)")
    how = parser.add_argument_group("how")
    how.add_argument("--device", default="cuda", help="cuda or cuda:N")
    how.add_argument("--budget", type=float, help="seconds after which no further problem is begun; 0: compile")
    how.add_argument("--timeout", type=float, default=60.0, help="seconds for one measurement (default 60)")
    how.add_argument("--jobs", type=int, default=8, help="processes that compile beforehand (default 8)")
    how.add_argument("--again", action="store_true", help="measure what the table has a row for, too")
    out = parser.add_argument_group("what comes out")
    out.add_argument("--table", metavar="FILE", help="the table to write (default: the user's own)")
    out.add_argument("--out", metavar="FILE", help="--evaluate: JSON lines, gone on with; --crossover: JSON")
    add_problem_flags(parser)
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Returns 0; 1 if a result was wrong, nothing ran or there is no GPU; 2 for wrong usage."""
    parser = _parser()
    args = parser.parse_args(argv)
    limits = Limits(timeout=args.timeout, budget=args.budget, jobs=args.jobs)
    try:
        if args.evaluate is not None:
            return evaluate(args.evaluate, args.seed, args.device, limits, args.out)
        if args.crossover:
            return crossover(args.device, limits, args.out)
        problems = problems_from(args, parser)
        table = args.table or user_table_path() or str(user_folder() / USER_FILE)
        command = "python -m extend_attn tune " + shlex.join(sys.argv[2:] if argv is None else argv)
        return tune(problems, args.device, limits, table=table, command=command, again=args.again)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 1


def problems_from(args: argparse.Namespace, parser: argparse.ArgumentParser) -> List[Problem]:
    """The problems that the command line names; wrong usage ends the program with status 2."""
    found: List[Problem] = []
    try:
        for path in args.problems:
            data = json.loads(read(path))
            if not isinstance(data, list):
                raise ValueError(f"--problems: {path} holds no JSON list")
            found += [Problem.from_json(one) for one in data]
        if args.rows is not None:
            found += [row.problem() for row in rows_named(args.rows)]
        if args.model is not None:
            found += Problem.for_model(**model_arguments(args.model))
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    if args.problem is not None or not found:
        found.append(problem_from(args, parser))
    return list(dict.fromkeys(found))


def model_arguments(text: str) -> Dict[str, Any]:
    """``head_dim=256,max_len_extend=1:4`` as keyword arguments; ValueError for what has no such form."""
    arguments: Dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not name or not value:
            raise ValueError(f"--model: {part!r} is not NAME=VALUE")
        values = [_value(one) for one in value.split(":")]
        arguments[name.strip()] = values[0] if len(values) == 1 else values
    for name in ("batch_sizes", "prefix"):  # these are lists
        if name in arguments and not isinstance(arguments[name], list):
            arguments[name] = [arguments[name]]
    return arguments


def _value(text: str) -> Any:
    """A JSON number, true or false; any other text is itself (a type's name)."""
    try:
        return json.loads(text)
    except ValueError:
        return text
