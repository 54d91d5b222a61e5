"""What the commands draw: a plain table for stdout, a progress bar for stderr. rich is used if it is installed."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import Callable, Iterator, Sequence


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns under their headers; numbers (first character a digit or a sign) are right-aligned."""
    cells = [list(headers)] + [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    numeric = [all(row[i][:1].isdigit() or row[i][:1] in ("-", "+") for row in cells[1:]) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        aligned = [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric)]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(cells[0]), line(["-" * w for w in widths]), *(line(row) for row in cells[1:])])


@contextmanager
def progress(total: int, title: str) -> Iterator[Callable[[str], None]]:
    """Yields ``advance(text)``: call it when a step begins, with what it is.

    On a terminal with rich a bar, elsewhere one line a step, so that a log shows where a run is.
    """
    rich = _rich_progress() if sys.stderr.isatty() else None
    if rich is None:
        done = 0

        def say(text: str) -> None:
            nonlocal done
            done += 1
            print(f"[{done}/{total}] {title}: {text}", file=sys.stderr, flush=True)

        yield say
        return
    with rich as bar:
        task = bar.add_task(title, total=total)
        started = False

        def advance(text: str) -> None:
            nonlocal started
            bar.update(task, advance=1 if started else 0, description=f"{title}: {text}", refresh=True)
            started = True

        yield advance
        bar.update(task, completed=total, description=title)


def _rich_progress():
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        return None
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=Console(stderr=True), transient=True)
