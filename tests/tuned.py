"""What the tests of ``tune`` and of its evaluation share: a small problem, and a worker that answers by itself."""

from __future__ import annotations

import dataclasses
import json

from extend_attn.plan import DeviceSpec, Plan
from extend_attn.problem import Problem

H100 = dataclasses.replace(DeviceSpec.preset("h100"), triton="3.6.0")
SIZES = dict(head_dim_qk=32, head_dim_v=32, num_q_heads=4, num_kv_heads=2)


def problem(**fields):
    sizes = dict(batch_size=3, num_tokens=12, max_len_extend=4, num_kv_indices=60)
    return Problem(**{"dtype": "float32", **SIZES, **sizes, **fields})


class Answers:
    """Stands for WorkerProcess: a time by plan, or a reason."""

    asked = []
    times = {}

    def __init__(self, device, **kwargs):
        pass

    def ask(self, task):
        if task["op"] == "hello":
            return {"device": H100.name, "arch": "sm_90", "sm_count": 132, "versions": {"triton": "3.6.0"}}
        if task["op"] == "spec":
            return {"spec": json.loads(json.dumps(dataclasses.asdict(H100)))}
        plan = Plan.from_json(task["plan"])
        self.asked.append((Problem.from_json(task["problem"]), plan))
        found = self.times.get(plan, 50.0)
        return {"failed": found} if isinstance(found, str) else {"us": found}

    def stop(self):
        pass
