"""The benches: ``python -m extend_attn bench attention``, ``bench host``. Importing them needs no torch and no GPU."""

from __future__ import annotations

from typing import List, Optional


def main(argv: Optional[List[str]] = None) -> int:
    """Run ``bench KIND [options]``; returns the exit status: 0 good, 1 a result was wrong, 2 wrong usage."""
    if argv and argv[0] == "host":
        from .host import main as host

        return host(argv[1:])
    from .main import main as run

    return run(argv)
