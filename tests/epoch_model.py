"""A model of the protocol in csrc/comm/signal.cuh, small enough to try every order in which things can happen.

Each block of each rank is a list of steps; a store travels on its own and lands at any later moment, in any order,
except that what a call stored lands before anything that its rank stores in a later one (its kernel has ended), and a
release after all that its block stored before. ``explore`` visits every state that any interleaving
reaches and raises Violation if a slot is overwritten before it was read, a wrong value is read, or all blocks wait for
ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

EMPTY = None
Value = object
Cell = Tuple[object, ...]  # (owner, what, ...)


class Violation(AssertionError):
    """The protocol went wrong in some interleaving."""


@dataclass(frozen=True)
class Protocol:
    """The rules; each can be broken, to see that the model notices."""

    epochs: int = 2
    end_barrier: bool = True  # a pull ends with a meeting
    calls_end: bool = True  # what a call stored lands before what its rank's next call stores
    release_orders: bool = True  # the release of a start lands after its block's earlier stores
    clears: bool = True  # a reader empties the slot


@dataclass(frozen=True)
class State:
    memory: Tuple[Tuple[Cell, Value], ...]  # cells that are not EMPTY
    flights: Tuple[Tuple[int, int, int, Cell, Value], ...]  # (rank, block, call, cell, value) on their way
    where: Tuple[Tuple[int, ...], ...]  # [rank][block] step in the rank's call
    call: Tuple[int, ...]  # [rank]
    epoch: Tuple[int, ...]  # [rank], in device memory: what a call has read, until all its blocks are through


def steps_of(op: str, block: int, protocol: Protocol) -> List[str]:
    """What a block does in a call; "norm" pushes like "push", and its header says so."""
    if op in ("push", "norm"):
        steps = ["header"] if block == 0 else []
        return [*steps, "push", "await header", "take", *(["clear"] if protocol.clears else []), "done"]
    steps = ["stage", "signal start", *(["header"] if block == 0 else []), "await header", "await start", "read"]
    return [*steps, *(["signal end", "await end"] if protocol.end_barrier else []), "done"]


class Model:
    def __init__(self, ops: Sequence[str], *, ranks: int = 2, blocks: int = 1, protocol: Optional[Protocol] = None):
        self.ops, self.ranks, self.blocks = tuple(ops), ranks, blocks
        self.protocol = protocol or Protocol()
        self.programs = {op: [steps_of(op, b, self.protocol) for b in range(blocks)] for op in set(ops)}

    def start(self) -> State:
        none = (0,) * self.blocks
        return State((), (), (none,) * self.ranks, (0,) * self.ranks, (0,) * self.ranks)

    def finished(self, state: State) -> bool:
        return all(call == len(self.ops) for call in state.call) and not state.flights

    def successors(self, state: State) -> Iterator[State]:
        """What can happen next. A step that only sends is taken at once: its store lands whenever it likes anyway."""
        memory = dict(state.memory)
        running = [(r, b) for r in range(self.ranks) if state.call[r] < len(self.ops) for b in range(self.blocks)]
        for rank, block in running:
            if self._only_sends(state, rank, block):
                yield self._step(state, memory, rank, block)
                return
        for number in range(len(state.flights)):
            if not self._held_back(state.flights, number):
                yield self._land(state, memory, number)
        for rank, block in running:
            after = self._step(state, memory, rank, block)
            if after is not None:
                yield after

    def _only_sends(self, state: State, rank: int, block: int) -> bool:
        program, at = self.programs[self.ops[state.call[rank]]][block], state.where[rank][block]
        return at < len(program) and program[at].startswith(("header", "push", "clear", "stage", "signal", "done"))

    def _held_back(self, flights, number: int) -> bool:
        """Behind stores of its rank's earlier calls; a release, of its block; any, behind one to its cell."""
        rank, block, call, cell, _ = flights[number]
        release = cell[1] == "start" and self.protocol.release_orders
        return any(
            r == rank and (c == cell or (k < call and self.protocol.calls_end) or (release and b == block))
            for r, b, k, c, _ in flights[:number]
        )

    def _land(self, state: State, memory: Dict[Cell, Value], number: int) -> State:
        cell, value = state.flights[number][3:]
        memory = dict(memory)
        if cell[1] == "slot":
            before = memory.get(cell, EMPTY)
            if value is EMPTY and before is not EMPTY and before[1] != self._reader_call(state, memory, cell):
                raise Violation(f"clearing {cell} loses {before}")
            if value is not EMPTY and before is not EMPTY:
                raise Violation(f"{cell} holds {before} when {value} arrives")
        if value is EMPTY:
            memory.pop(cell, None)
        else:
            memory[cell] = value
        flights = state.flights[:number] + state.flights[number + 1 :]
        return self._with(state, memory=memory, flights=flights)

    @staticmethod
    def _reader_call(state: State, memory: Dict[Cell, Value], cell: Cell) -> int:
        """The call whose data the owner of a slot has taken last from it."""
        return memory.get((cell[0], "taken", *cell[2:]), -1)

    def _step(self, state: State, memory: Dict[Cell, Value], rank: int, block: int) -> Optional[State]:
        call, epoch = state.call[rank], state.epoch[rank]
        op, at = self.ops[call], state.where[rank][block]
        program = self.programs[op][block]
        if at == len(program):
            return None  # this block is through; the call goes on
        step, parity, peers = program[at], epoch % self.protocol.epochs, [r for r in range(self.ranks) if r != rank]
        flights, memory = list(state.flights), dict(memory)

        def send(cell: Cell, value: Value) -> None:
            flights.append((rank, block, call, cell, value))

        if step == "header":
            for peer in peers:
                send((peer, "header", parity, rank), (epoch, op))
        elif step == "push":
            for peer in peers:
                send((peer, "slot", parity, rank, block), (rank, call))
        elif step == "await header":
            for peer in peers:
                header = memory.get((rank, "header", parity, peer), EMPTY)
                if header is EMPTY or header[0] == epoch - self.protocol.epochs:
                    return None
                if header != (epoch, op):
                    raise Violation(f"rank {rank} in {(epoch, op)} sees the header {header} of rank {peer}")
        elif step == "take":
            for peer in peers:
                value = memory.get((rank, "slot", parity, peer, block), EMPTY)
                if value is EMPTY:
                    return None
                if value != (peer, call):
                    raise Violation(f"rank {rank} in call {call} takes {value}")
                memory[rank, "taken", parity, peer, block] = call
        elif step == "clear":
            for peer in peers:
                send((rank, "slot", parity, peer, block), EMPTY)
        elif step == "stage":
            send((rank, "staging", block), (rank, call))
        elif step.startswith("signal"):
            for peer in peers:
                send((peer, step[7:], block, rank), epoch)
        elif step.startswith("await"):
            if any(memory.get((rank, step[6:], block, peer), -1) < epoch for peer in peers):
                return None
        elif step == "read":
            for peer in peers:
                value = memory.get((peer, "staging", block), EMPTY)
                if value != (peer, call):
                    raise Violation(f"rank {rank} in call {call} reads {value} from the staging of rank {peer}")
        return self._advance(self._with(state, memory=memory, flights=tuple(flights)), rank, block)

    def _advance(self, state: State, rank: int, block: int) -> State:
        """To the next step. After the last block's last one the next call may begin, with the next epoch."""
        where = [list(row) for row in state.where]
        where[rank][block] += 1
        call, epoch = list(state.call), list(state.epoch)
        programs = self.programs[self.ops[call[rank]]]
        if all(at == len(program) for at, program in zip(where[rank], programs)):
            where[rank] = [0] * self.blocks
            call[rank] += 1
            epoch[rank] += 1
        return State(state.memory, state.flights, tuple(map(tuple, where)), tuple(call), tuple(epoch))

    @staticmethod
    def _with(state: State, *, memory: Dict[Cell, Value], flights) -> State:
        cells = tuple(sorted(memory.items(), key=repr))
        return State(cells, tuple(flights), state.where, state.call, state.epoch)


def explore(model: Model) -> int:
    """Visits every reachable state; their number."""
    start = model.start()
    seen, todo = {start}, [start]
    while todo:
        state = todo.pop()
        moved = False
        for after in model.successors(state):
            moved = True
            if after not in seen:
                seen.add(after)
                todo.append(after)
        if not moved and not model.finished(state):
            raise Violation(f"all wait for ever: calls {state.call}, steps {state.where}")
    return len(seen)
