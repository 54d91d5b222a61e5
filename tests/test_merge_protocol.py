"""The protocol of kernels/hopper/merge.py in a model: every order in which the atomic operations of programs can go.

Whoever is fast, slow or impatient, each slice is merged after the last part is there, and the word of arrivals is at
the begin of the next epoch.
"""

from __future__ import annotations

import pytest

HANDED_OVER, ARRIVAL, EPOCH = 1, 2, 1 << 16
START = 5 * EPOCH


def program(part, parts, patience, waits):
    """Yields (operation on the word) and gets what the word was before; returns the slices it merges."""
    before = yield lambda word: word + ARRIVAL
    epoch = before & -EPOCH
    arrived = (before - epoch) // ARRIVAL + 1
    slices = {part}
    if arrived == parts:
        if not waits or before & HANDED_OVER:
            slices = set(range(parts))
        yield lambda word: epoch + EPOCH
    elif waits:
        for _ in range(patience):
            if arrived >= parts:
                break
            arrived = ((yield lambda word: word) - epoch) // ARRIVAL
        if arrived < parts:
            arrived = ((yield lambda word: word | HANDED_OVER) - epoch) // ARRIVAL
            if arrived >= parts:
                yield lambda word: word & (-1 - HANDED_OVER)
    return slices if arrived >= parts else set()


def run(schedule, parts, patience, waits):
    """Steps programs in the order of ``schedule``: (those that can go on, None) or (None, outcome) at its end."""
    running = {i: program(i, parts, patience[i], waits) for i in range(parts)}
    pending = {i: next(one) for i, one in running.items()}
    word, merged, arrivals = START, [], 0
    for i in schedule:
        before, word = word, pending[i](word)
        arrivals += before + ARRIVAL == word and arrivals < parts
        try:
            pending[i] = running[i].send(before)
        except StopIteration as end:
            merged.append((end.value, arrivals))
            del pending[i]
    return (sorted(pending), None) if pending else (None, (word, merged))


def outcomes(parts, patience, waits):
    stack = [()]
    while stack:
        schedule = stack.pop()
        ready, outcome = run(schedule, parts, patience, waits)
        if outcome:
            yield outcome
        else:
            stack.extend((*schedule, i) for i in ready)


@pytest.mark.parametrize(
    "patience, waits",
    [((0, 0), True), ((1, 0), True), ((2, 1), True), ((0, 0, 0), True), ((1, 0, 0), True), ((0, 0, 0), False)],
)  # fmt: skip
def test_every_slice_is_merged_and_the_next_epoch_begins(patience, waits):
    parts, seen = len(patience), 0
    for word, merged in outcomes(parts, patience, waits):
        seen += 1
        assert word == START + EPOCH
        assert set().union(*(slices for slices, _ in merged)) == set(range(parts))
        assert all(arrivals == parts for slices, arrivals in merged if slices)
    assert seen >= parts
