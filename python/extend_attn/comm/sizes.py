"""Numbers of bytes as people write them: ``64KiB``, ``1MiB``, ``4096``."""

from __future__ import annotations

import re

UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_PATTERN = re.compile(r"(\d+)\s*([A-Za-z]*)")


def parse_bytes(text: str) -> int:
    """``"64KiB"`` -> 65536. Units are B, KiB, MiB, GiB (powers of 1024) in any case, none meaning bytes."""
    found = _PATTERN.fullmatch(text.strip())
    if found is None or found.group(2).upper() not in UNITS:
        raise ValueError(f"bytes: got {text!r}; expected a number such as 4096, 64KiB, 1MiB")
    return int(found.group(1)) * UNITS[found.group(2).upper()]


def format_bytes(nbytes: int) -> str:
    """The shortest exact text: 65536 -> ``"64 KiB"``, 5632 -> ``"5632 B"``."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes and nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"
