"""All-reduce over the GPUs of one host: ``CustomAllReduce``, and the same on one GPU for tests, ``virtual_ranks``.

Importing this package imports no torch: each public name is fetched from its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .communicator import CustomAllReduce
    from .errors import CommDisagreement, CommError, CommTimeout, PeerLost
    from .policy import Policy
    from .virtual import virtual_ranks

_HOME = {
    "CommDisagreement": "errors",
    "CommError": "errors",
    "CommTimeout": "errors",
    "CustomAllReduce": "communicator",
    "PeerLost": "errors",
    "Policy": "policy",
    "virtual_ranks": "virtual",
}

__all__ = [
    "CommDisagreement",
    "CommError",
    "CommTimeout",
    "CustomAllReduce",
    "PeerLost",
    "Policy",
    "virtual_ranks",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module("." + _HOME[name], __name__), name)
    globals()[name] = value
    return value
