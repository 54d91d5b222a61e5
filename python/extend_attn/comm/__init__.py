"""All-reduce over the GPUs of one host: ``CustomAllReduce``, and the same on one GPU for tests, ``virtual_ranks``."""

from .communicator import CustomAllReduce
from .errors import CommDisagreement, CommError, CommTimeout, PeerLost
from .policy import Policy
from .virtual import virtual_ranks

__all__ = [
    "CommDisagreement",
    "CommError",
    "CommTimeout",
    "CustomAllReduce",
    "PeerLost",
    "Policy",
    "virtual_ranks",
]
