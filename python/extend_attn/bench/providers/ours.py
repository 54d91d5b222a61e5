"""The library itself, through its public function."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any, Dict, List, Optional

from .base import OWN, Prepared, Provider

if TYPE_CHECKING:
    from ..data import Batch


KV_INDICES, MAX_LEN_EXTEND = 8, 12  # their places among the arguments


class Ours(Provider):
    name = OWN
    what = "this library; --plan, --sweep and --candidates choose its plan"

    def prepare(self, batch: Batch, plan: Optional[Any] = None) -> Prepared:
        import torch

        from extend_attn.attention import extend_attention_fwd, prepare

        options = dict(sliding_window_size=batch.window, plan=plan)
        calls = [batch.arguments(i) for i in range(len(batch.sets))]

        def run(i: int):
            extend_attention_fwd(*calls[i], **options)
            return batch.sets[i].o

        run(0)  # a tile that does not fit after all is replaced in the first call; the plan is read after it
        _, problem, chosen = prepare(*calls[0], **options)
        on_gpu = batch.device.type == "cuda"  # a CPU runs the reference, with no plan

        def other_lengths(n: int):
            """As in an engine's next step: a longer array of slots, or, without a prefix, another bound."""
            longer = [*calls[0]]
            slots = longer[KV_INDICES]
            longer[KV_INDICES] = torch.cat([slots, slots[:n]])
            longer[MAX_LEN_EXTEND] += n * (batch.row.prefix == 0)
            return partial(extend_attention_fwd, *longer, **options)

        return Prepared(
            run=run,
            plan=plan_json(chosen) if on_gpu else None,
            problem=problem.to_json(),
            call=partial(extend_attention_fwd, *calls[0], **options),
            other_lengths=other_lengths,
        )

    def versions(self) -> Dict[str, str]:
        from extend_attn import __version__

        return {OWN: __version__}


def plan_json(plan: Any) -> Optional[Dict[str, Any]]:
    """A Plan as a JSON object (None where the call took no plan, as on a CPU)."""
    if plan is None:
        return None
    data = plan.to_json()
    return json.loads(data) if isinstance(data, str) else dict(data)


def swept_plans(batch: Batch, which: str) -> Dict[str, List[Any]]:
    """The plans of a sweep: ``sweep`` is the published list of 12 tiles, ``candidates`` what the plan module offers.

    ``plans`` are those that can run here, the library's own choice first; ``illegal``, [plan, reason] of the others.
    """
    from extend_attn.attention import prepare
    from extend_attn.devices import device_spec
    from extend_attn.plan import candidates as listed
    from extend_attn.plan import illegal, select

    problem = prepare(*batch.arguments(0), sliding_window_size=batch.window)[1]
    device = device_spec(batch.device)
    if which == "sweep":
        from extend_attn.plan.candidates import sweep12

        plans = list(sweep12())
    else:
        plans = [select(problem, device), *listed(problem, device)]
    legal: List[Dict[str, Any]] = []
    others: List[Any] = []
    for plan in plans:
        data, reason = plan_json(plan), illegal(problem, plan, device)
        if reason is not None:
            others.append([data, reason])
        elif data is not None and _same(data) not in map(_same, legal):
            legal.append(data)
    return {"plans": legal, "illegal": others}


def _same(plan: Dict[str, Any]) -> Dict[str, Any]:
    """A plan without where it came from."""
    return {name: value for name, value in plan.items() if name != "source"}
