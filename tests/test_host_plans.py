"""What a repeated call keeps of its plan: chosen and laid out once, in the interpreter; never another call's."""

from __future__ import annotations

import collections.abc
import copy

import pytest
import torch
from modes import modes
from test_host import FULL, call, case, known, nothing_remembered  # noqa: F401 (autouse here too)

from extend_attn import attention, calls
from extend_attn.devices import device_spec
from extend_attn.inputs import Inputs
from extend_attn.plan import Plan, Tile
from extend_attn.plan.select import forget, select

interpreted = pytest.mark.parametrize("mode", modes("packed", reference=False, gpu=False), indirect=True)


@pytest.fixture
def launches(monkeypatch):
    """(plan, recipe) of every launch."""
    seen = []
    launching = attention._launching()
    launch = launching.launch

    def watched(plan, inputs, problem, recipe=None):
        seen.append((plan, recipe))
        return launch(plan, inputs, problem, recipe)

    monkeypatch.setattr(launching, "launch", watched)
    return seen


@interpreted
def test_a_repeated_call_is_not_planned_again(mode, launches, monkeypatch):
    one = case(lengths=[(3, 20), (1, 4)], **{**FULL, "cut": [1, 2]})
    first = call(one)
    monkeypatch.setattr(attention, "select", None)
    again = call(one)
    assert launches[0][1] is launches[1][1] is not None
    assert torch.equal(first.nan_to_num(), again.nan_to_num())
    expected = one.expected.out
    assert (again[: expected.shape[0]].double() - expected).abs().nan_to_num().max() < 1e-5


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_with_splits_repeats(mode, launches, monkeypatch, dtype):
    one = case(lengths=[(2, 300), (1, 150)], dtype=dtype)
    plan = Plan("packed", Tile(16, 16, 4, 1), split_kv=3)
    monkeypatch.setattr(attention, "select", lambda *args, **kwargs: plan)
    first, again = call(one), call(one)
    assert [p for p, _ in launches] == [plan, plan] and len(launches[1][1].kernels) == 2
    assert torch.equal(first.nan_to_num(), again.nan_to_num())


@interpreted
def test_the_users_table_and_forget_are_respected(mode, launches, monkeypatch, tmp_path):
    asked = []

    def select(*args, **kwargs):
        asked.append(kwargs)
        return INTERPRETED_PLAN

    monkeypatch.setattr(attention, "select", select)
    one = case(lengths=[(2, 3)])
    call(one), call(one)
    assert len(asked) == 1
    monkeypatch.setenv("EXTEND_ATTN_TABLE", str(tmp_path / "one.json"))
    call(one), call(one)
    assert len(asked) == 2
    monkeypatch.delenv("EXTEND_ATTN_TABLE")
    call(one)
    assert len(asked) == 2
    forget()
    call(one)
    assert len(asked) == 3
    call(one, plan={"family": "packed"})  # a plan that the caller names is kept beside the default
    call(one, plan={"family": "packed"})
    assert len(asked) == 4
    call(one)
    assert len(asked) == 4
    forget()
    call(one, plan={"family": "packed"})
    assert len(asked) == 5


INTERPRETED_PLAN = Plan("packed", Tile(16, 16, 4, 1))


@interpreted
def test_a_step_down_replaces_what_is_remembered(mode, monkeypatch):
    """One warning; from then on the smaller plan, for other lengths of the same bucket too."""
    launching = attention._launching()
    launched = []
    launch, refused = launching.launch, []

    def tight(plan, inputs, problem, recipe=None):
        if not refused or plan == refused[0]:
            refused.append(plan)
            raise launching.OutOfResources(1 << 20, 1 << 10, "shared memory")
        launched.append(plan)
        return launch(plan, inputs, problem, recipe)

    monkeypatch.setattr(launching, "launch", tight)
    monkeypatch.setattr(attention, "_stepped_down", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    one = case(lengths=[(2, 3), (2, 9)])
    with pytest.warns(UserWarning, match="does not fit"):
        call(one)
    call(one), call(one)
    call(case(lengths=[(2, 4), (2, 8)]))
    assert len(refused) == 1 and len(launched) == 4 and set(launched) == {launched[0]} != {refused[0]}


class _Bound:
    """Stands for kernels bound to all but addresses; where there is no GPU none are."""

    needs_rows = False

    def __init__(self, recipe, seen):
        self.recipe, self.seen = recipe, seen

    def ready(self):
        return True

    def launch(self, addresses):
        self.seen.append((self.recipe, addresses))


@pytest.fixture
def bound_launches(monkeypatch):
    """(recipe, addresses) of every bound launch: all but the first of a signature."""
    seen = []
    monkeypatch.setattr(attention._launching(), "bind", lambda recipe, checked: _Bound(recipe, seen))
    return seen


@interpreted
def test_a_call_that_is_verified_launches_what_verify_returns(mode, launches, bound_launches, monkeypatch):
    """Under capture those are not the call's tensors: a bad index zeroes qo_indptr."""
    one = case(lengths=[(2, 3)])
    call(one), call(one)
    assert len(launches) == len(bound_launches) == 1
    monkeypatch.setattr(attention, "verify", lambda i: i._replace(qo_indptr=torch.zeros_like(i.qo_indptr)))
    out = call(one, check=True)
    assert len(launches) == 2 and len(bound_launches) == 1 and out.isnan().all()


@interpreted
@pytest.mark.parametrize("lengths", [[], [(0, 4)]], ids=str)
def test_an_empty_batch_is_never_bound(mode, lengths, bound_launches):
    """There is nothing to launch again, and TMA has no descriptor of a tensor without rows."""
    one = case(lengths=lengths)
    for _ in range(3):
        call(one)
    assert not bound_launches
    call(case(lengths=[(2, 3)])), call(case(lengths=[(2, 3)]))
    assert len(bound_launches) == 2


# -- plans that the caller names

ASKED = {
    "Plan": {"plan": Plan("packed", Tile(16, 32, 4, 1), split_kv=2)},
    "fields": {"plan": {"family": "packed", "tile": {"block_m": 16, "block_n": 16, "num_stages": 1}, "split_kv": 2}},
    "selector": {"plan": "sglang"},
    "tile": {"tile": (32, 32, 4, 1)},
    "list": {"tile": [32, 32]},
    "tile's fields": {"tile": {"num_stages": 1}},
    "selector and Tile": {"plan": "sglang", "tile": Tile(16, 16, 4, 1)},
    "nothing": {"plan": {}},
}


@pytest.fixture
def chosen(monkeypatch):
    """The plans that were selected, in order."""
    seen = []

    def watched(*args, **kwargs):
        seen.append(select(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(attention, "select", watched)
    return seen


@interpreted
@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("asked", ASKED)
def test_a_named_plan_is_checked_and_chosen_once(mode, chosen, launches, bound_launches, monkeypatch, asked, unified):
    """By what it says: each call has a plan of its own that says the same."""
    one = case(unified, lengths=[(2, 20)])
    out = call(one, **ASKED[asked])
    monkeypatch.setattr(Inputs, "problem", None)  # what a full check ends with
    for _ in range(2):
        call(one, **copy.deepcopy(ASKED[asked]))
    problem = known(one)[1].problem
    assert chosen == [select(problem, device_spec(torch.device("cpu")), **ASKED[asked])]
    assert [plan for plan, _ in launches] == chosen
    assert len(bound_launches) == 2 and all(recipe is launches[0][1] for recipe, _ in bound_launches)
    assert bound_launches[0][1][0] != bound_launches[0][1][3]  # addresses: the query's, the output's
    assert (out.double() - one.expected.out).abs().nan_to_num().max() < 1e-5


@interpreted
def test_each_named_plan_is_kept_beside_the_others(mode, chosen, launches, bound_launches):
    one = case(lengths=[(2, 20)])
    for _ in range(3):
        for asked in (*ASKED.values(), {}):
            call(one, **asked)
    assert len(chosen) == len(ASKED) + 1
    recipes = [recipe for _, recipe in launches] + [recipe for recipe, _ in bound_launches]
    own = recipes[: len(chosen)]
    assert len({id(recipe) for recipe in own}) == len(own) and len(recipes) == 3 * len(own)
    assert all(recipe is own[i % len(own)] for i, recipe in enumerate(recipes))


@interpreted
def test_a_plan_that_was_changed_in_place_is_another(mode, launches):
    """At any depth; changed back it is the first."""
    one = case(lengths=[(2, 20)])
    plan = {"family": "packed", "tile": {"block_m": 16, "block_n": 16, "num_stages": 1}, "split_kv": 1}
    for holder, name, value in ((plan, "split_kv", 2), (plan["tile"], "block_n", 32), (plan, "tile", [32, 16, 4, 1])):
        call(one, plan=plan)
        before = holder[name]
        holder[name] = value
        call(one, plan=plan)
        holder[name] = before
    tile = [16, 16, 4, 1]
    call(one, tile=tile)
    tile[1] = 32
    call(one, tile=tile)
    plans = [plan for plan, _ in launches]
    assert plans[0] == plans[2] == plans[4] == Plan("packed", Tile(16, 16, 4, 1))
    assert launches[0][1] is launches[2][1] is launches[4][1]
    assert [plans[1].split_kv, plans[3].tile, plans[5].tile] == [2, Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)]
    assert [plans[6].tile, plans[7].tile] == [Tile(16, 16, 4, 1), Tile(16, 32, 4, 1)]


class _Sizes(collections.abc.Sequence):
    """A tile of a type that the library knows nothing of: hashable, and it changes."""

    def __init__(self, *sizes):
        self.sizes = list(sizes)

    def __getitem__(self, i):
        return self.sizes[i]

    def __len__(self):
        return len(self.sizes)


@interpreted
def test_a_plan_of_unknown_parts_is_not_remembered(mode, chosen):
    one, tile = case(lengths=[(2, 20)]), _Sizes(16, 16, 4, 1)
    call(one, tile=tile)
    tile.sizes[1] = 32
    call(one, tile=tile)
    assert [plan.tile.block_n for plan in chosen] == [16, 32]


ILLEGAL = {
    "field": ({"plan": {"family": "tiled", "split_kv": 4}}, ValueError, "^plan: .*split_kv"),
    "tile": ({"tile": (256, 256, 8, 8)}, ValueError, "^plan: .*registers"),
    "Plan": ({"plan": Plan("tiled", Tile(256, 256, 8, 8))}, ValueError, "^plan: .*registers"),
    "selector": ({"plan": "fastest"}, ValueError, "^plan: got 'fastest'"),
    "type": ({"plan": 64}, TypeError, "^plan: got 64"),
    "number for a flag": ({"plan": {"family": "packed", "pdl": 0}}, TypeError, "^pdl: got 0"),
    "flag for a number": ({"plan": {"family": "packed", "split_kv": True}}, TypeError, "^split_kv: got True"),
    "no number of tokens": ({"tile": (16, 16.0)}, TypeError, "^block_n: got 16.0"),
    "two tiles": ({"plan": {"tile": (16, 16)}, "tile": (16, 16)}, ValueError, "^tile: .* already names"),
    "set": ({"plan": {"tile": {16}}}, TypeError, "^tile: got "),
}
# What the illegal ones must not be taken for.
ALIKE = [
    {"plan": {"family": "packed", "pdl": False}},
    {"plan": {"family": "packed", "split_kv": 1}},
    {"tile": (16, 16)},
]


@pytest.mark.parametrize("mode", modes("packed", gpu=False), indirect=True)
@pytest.mark.parametrize("what", ILLEGAL)
def test_an_illegal_plan_is_refused_every_time(mode, what):
    one = case(lengths=[(2, 20)])
    asked, error, message = ILLEGAL[what]
    with pytest.raises(error, match=message):  # before anything is remembered
        call(one, **asked)
    for legal in ({}, *ALIKE):
        call(one, **legal), call(one, **legal)
        with pytest.raises(error, match=message):
            call(one, **asked)


@interpreted
def test_a_named_plan_never_steps_down(mode, launches, monkeypatch):
    launching = attention._launching()
    launch, tight = launching.launch, [True]

    def launched(*arguments):
        if tight[0]:
            raise launching.OutOfResources(1 << 20, 1 << 10, "shared memory")
        return launch(*arguments)

    monkeypatch.setattr(launching, "launch", launched)
    one = case(lengths=[(2, 20)])
    for _ in range(3):
        with pytest.raises(launching.OutOfResources):
            call(one, **ASKED["Plan"])
    tight[0] = False
    call(one, **ASKED["Plan"])
    assert [plan for plan, _ in launches] == [ASKED["Plan"]["plan"]]


def test_what_is_remembered_of_named_plans_is_bounded(monkeypatch):
    monkeypatch.setattr(calls, "MAX_LENGTHS", 3)
    one = case()
    for i in range(10):
        known(one, plan={"split_kv": 1 + i})
        (entry,) = calls._known.values()
        assert 1 <= len(entry.prepared) <= 3
