"""The benches: ``python -m extend_attn bench KIND``. Importing them needs neither torch nor a GPU."""

from __future__ import annotations

import sys
from typing import List, Optional

COLLECTIVES = ("all-reduce", "qknorm", "step", "capture", "collectives")  # what several ranks do together


def main(argv: Optional[List[str]] = None) -> int:
    """Run ``bench KIND [options]``; returns the exit status: 0 good, 1 a result was wrong, 2 wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COLLECTIVES:
        from .collectives.main import main as run
    elif argv and argv[0] == "host":
        from .host import main as run

        argv = argv[1:]
    else:
        from .attention import main as run
    return run(argv)
