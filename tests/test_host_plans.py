"""What a repeated call keeps of its plan: chosen and laid out once, in the interpreter; never another call's."""

from __future__ import annotations

import pytest
import torch
from modes import modes
from test_host import FULL, call, case

import extend_attn
from extend_attn import attention, calls, guards
from extend_attn.plan.select import forget

interpreted = pytest.mark.parametrize("mode", modes("packed", reference=False, gpu=False), indirect=True)


@pytest.fixture(autouse=True, params=["guards", "signatures"])
def nothing_remembered(request, monkeypatch):
    """As in test_host.py."""
    if request.param == "signatures":
        monkeypatch.setattr(guards, "_TensorGuards", None)
    calls.forget()
    yield
    calls.forget()


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
    plan = extend_attn.Plan("packed", extend_attn.Tile(16, 16, 4, 1), split_kv=3)
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
    call(one, plan={"family": "packed"})  # a plan that the caller names is asked about every time, and not kept
    call(one, plan={"family": "packed"})
    assert len(asked) == 5
    call(one)
    assert len(asked) == 5


INTERPRETED_PLAN = extend_attn.Plan("packed", extend_attn.Tile(16, 16, 4, 1))


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
    """(recipe, addresses) of every bound launch: the second call of a kind is bound."""
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
