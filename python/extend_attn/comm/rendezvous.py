"""How ranks tell each other something on the host: through torch.distributed, or within one process.

Both have ``exchange(what, value, then)``: give ``value``, and once every rank has, ``then(values)`` is called with all
of them in rank order. In a process group that is before ``exchange`` returns; among virtual ranks it is when the last
of them calls. ``made`` counts the exchanges by ``what``.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, Callable, Dict, List, Tuple

from .errors import CommError, lost

Then = Callable[[List[Any]], None]


def _check_same(rank: int, whats: List[str]) -> None:
    if len(set(whats)) > 1:
        listed = ", ".join(f"rank {r}: {what}" for r, what in enumerate(whats))
        raise CommError(f"rank {rank}: ranks called different things of the communicator ({listed})")


class GroupRendezvous:
    """The ranks of a torch.distributed process group; gloo will do, for only host objects travel."""

    virtual = False

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "group: torch.distributed is not initialized; call torch.distributed.init_process_group first"
            )
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: this process is not in it")
        self.made: Counter = Counter()

    def exchange(self, what: str, value: Any, then: Then) -> None:
        import torch.distributed as dist

        self.made[what] += 1
        gathered: List[Any] = [None] * self.world_size
        try:
            dist.all_gather_object(gathered, (what, value), group=self.group)
        except RuntimeError as error:  # gloo: connection closed by peer; timeout
            raise lost(self.rank, error) from error
        _check_same(self.rank, [name for name, _ in gathered])
        then([given for _, given in gathered])


class Hub:
    """Where the virtual ranks of one process leave what they exchange."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._waiting: Dict[int, Tuple[str, Any, Then]] = {}
        self._lock = threading.Lock()

    def deposit(self, rank: int, what: str, value: Any, then: Then) -> None:
        with self._lock:
            if rank in self._waiting:
                raise CommError(
                    f"rank {rank}: called {what} while its {self._waiting[rank][0]} waits for the other virtual ranks"
                )
            self._waiting[rank] = (what, value, then)
            if len(self._waiting) < self.world_size:
                return
            calls = [self._waiting[r] for r in range(self.world_size)]
            self._waiting = {}
        errors: List[BaseException] = []
        for r, (_, _, follow) in enumerate(calls):
            try:
                _check_same(r, [name for name, _, _ in calls])
                follow([given for _, given, _ in calls])
            except Exception as error:  # every rank gets its turn; the first error is raised for all
                errors.append(error)
        if errors:
            raise errors[0]


class VirtualRendezvous:
    """One virtual rank's side of a Hub."""

    virtual = True
    group = None

    def __init__(self, hub: Hub, rank: int) -> None:
        self._hub = hub
        self.rank = rank
        self.world_size = hub.world_size
        self.made: Counter = Counter()

    def exchange(self, what: str, value: Any, then: Then) -> None:
        self.made[what] += 1
        self._hub.deposit(self.rank, what, value, then)
