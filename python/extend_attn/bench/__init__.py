"""The bench: ``python -m extend_attn bench attention``. Importing it needs neither torch nor a GPU."""

from __future__ import annotations

from typing import List, Optional


def main(argv: Optional[List[str]] = None) -> int:
    """Run ``bench KIND [options]``; returns the exit status: 0 good, 1 a result was wrong, 2 wrong usage."""
    from .main import main as run

    return run(argv)
