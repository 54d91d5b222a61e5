"""The problems and devices that the tests of plans share."""

from __future__ import annotations

from dataclasses import replace

from extend_attn.plan import DeviceSpec
from extend_attn.problem import Problem

H200 = replace(DeviceSpec.preset("h200"), triton="3.5.1")  # a Triton before Gluon: the plain families' choices
ARCHITECTURES = "sm_75 sm_80 sm_86 sm_87 sm_89 sm_90 sm_100 sm_103 sm_120 sm_121 sm_130 hip".split()
VERIFY = Problem("bfloat16", 256, 256, 8, 4, batch_size=32, num_tokens=128, max_len_extend=4, num_kv_indices=256000)
PREFILL = Problem("bfloat16", 256, 256, 8, 4, batch_size=1, num_tokens=8192, max_len_extend=8192, num_kv_indices=0)
CHUNK = replace(PREFILL, batch_size=4, num_tokens=4096, max_len_extend=1024, num_kv_indices=4 * 4096)
