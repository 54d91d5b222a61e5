"""``python -m extend_attn COMMAND``: the command line. Each command is a module with ``main(argv)``."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import List, Optional

# Command -> (module, what it does). A module is imported only when its command is called: explain needs no torch.
COMMANDS = {
    "demo": ("extend_attn.cli.demo", "chunked prefill and draft verification over a scattered KV pool, checked"),
    "explain": ("extend_attn.cli.explain", "which kernel, tile or all-reduce a call gets, and why; needs no GPU"),
    "tune": ("extend_attn.cli.tune", "measure plans for given problems and keep the fastest in a table"),
    "bench": ("extend_attn.bench", "measure against the peers that are installed"),
    "jit": ("extend_attn.cli.jit", "compile the C++/CUDA half, show compilers and cache, clean it"),
    "doctor": ("extend_attn.cli.doctor", "versions, devices, folders and settings, with what is wrong among them"),
}


def _usage() -> str:
    lines = ["usage: python -m extend_attn COMMAND [options]", "", "commands (each has --help):"]
    lines += [f"  {name:8} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(lines)


def main(argv: Optional[List[str]] = None) -> int:
    """Run one command; returns the process's exit status (0 good, 1 a check failed, 2 wrong usage)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from extend_attn import __version__

        print(f"extend-attn {__version__}")
        return 0
    name = argv.pop(0)
    if name not in COMMANDS:
        print(f"extend_attn: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return import_module(COMMANDS[name][0]).main(argv) or 0


if __name__ == "__main__":
    sys.exit(main())
