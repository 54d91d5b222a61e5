"""Compiles the kernels of a plan for any GPU architecture, with no GPU in the machine.

Triton's launcher is asked to warm a kernel up under a driver that only knows which architecture it stands for, so that
arguments are specialised exactly as in a real call. Registers and spills come from the ``ptxas`` that Triton ships.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import subprocess
import tempfile
from typing import Iterator, List, Optional

import torch
import triton
from triton.backends.compiler import GPUTarget

from extend_attn.inputs import Inputs
from extend_attn.kernels.launch import kernels_of
from extend_attn.plan.tile import Plan
from extend_attn.problem import Problem


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one kernel: bytes of shared memory, registers a thread, bytes spilled a thread."""

    kernel: str
    shared_memory: int
    registers: Optional[int]
    spills: Optional[int]
    ptx: str


class _Driver:
    """What Triton's launcher asks a driver for before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # one cache of compiled kernels an architecture

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_device_capability(self, device: object = None) -> tuple:
        return divmod(self.arch, 10)


@contextlib.contextmanager
def architecture(arch: int) -> Iterator[None]:
    """Makes Triton compile for sm_``arch`` inside the block."""
    config = triton.runtime.driver
    with contextlib.suppress(RuntimeError):  # no GPU here, so nothing to go back to
        before = config.active
    config.set_active(_Driver(arch))
    try:
        yield
    finally:
        if "before" in locals():
            config.set_active(before)


def meta_inputs(problem: Problem) -> Inputs:
    """Inputs of this problem's shapes and types, without memory."""

    def empty(*shape: int, dtype: str) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    def value(k: Optional[torch.Tensor], aliases: bool, dtype: str) -> Optional[torch.Tensor]:
        if k is None or aliases:
            return None if k is None else k[..., :dim_v]
        return empty(k.shape[0], heads, dim_v, dtype=dtype)

    p = problem
    heads, dim, dim_v, batch = p.num_kv_heads, p.head_dim_qk, p.head_dim_v, p.batch_size
    pool = p.num_kv_indices > 0 or p.unified
    k_pool = empty(4096, heads, dim, dtype=p.kv_dtype) if pool else None
    k_new = None if p.unified else empty(p.num_tokens, heads, dim, dtype=p.dtype)
    return Inputs(
        q=empty(p.num_tokens, p.num_q_heads, dim, dtype=p.dtype),
        k_new=k_new,
        v_new=value(k_new, p.v_aliases_k_new, p.dtype),
        o=empty(p.num_tokens, p.num_q_heads, dim_v, dtype=p.out_dtype),
        k_pool=k_pool,
        v_pool=value(k_pool, p.v_aliases_k_pool, p.kv_dtype),
        qo_indptr=empty(batch + 1, dtype="int32"),
        kv_indptr=empty(batch + 1, dtype="int32"),
        kv_indices=empty(p.num_kv_indices, dtype=p.index_dtype),
        prefix_lens=empty(batch, dtype="int32") if p.unified else None,
        custom_mask=empty(1, dtype="uint8") if p.custom_mask else None,
        mask_indptr=empty(batch + 1, dtype="int64") if p.custom_mask else None,
        sinks=empty(p.num_q_heads, dtype="float32") if p.sinks else None,
        window_offsets=empty(batch, dtype="int32") if p.window_offsets else None,
        q_positions=empty(p.num_tokens, dtype="int32") if p.q_positions else None,
        lse=empty(p.num_tokens, p.num_q_heads, dtype="float32") if p.return_lse else None,
        batch_size=batch,
        max_len_extend=p.max_len_extend,
        max_len_prefix=p.max_len_prefix,
        sm_scale=dim**-0.5,
        k_scale=1.0,
        v_scale=1.0,
        logit_cap=p.logit_cap,
        xai_temperature_len=p.xai_temperature_len,
        sliding_window=p.sliding_window,
        is_causal=p.is_causal,
        mask_prefix=p.mask_prefix,
    )


def compile_plan(problem: Problem, plan: Plan, arch: int, *, resources: bool = False) -> List[Compiled]:
    """Compiles what ``plan`` launches for sm_``arch``; ``resources`` adds registers and spills (sm_80 to sm_90)."""
    found = []
    with architecture(arch):
        for kernel, grid, arguments, constants in kernels_of(plan, meta_inputs(problem), problem):
            compiled = kernel.warmup(*arguments, grid=grid, **constants)
            ptx = compiled.asm["ptx"]
            registers, spills = _resources(ptx, arch) if resources else (None, None)
            found.append(Compiled(kernel.__name__, compiled.metadata.shared, registers, spills, ptx))
    return found


def _resources(ptx: str, arch: int) -> tuple:
    import triton.backends.nvidia as nvidia

    ptxas = os.path.join(os.path.dirname(nvidia.__file__), "bin", "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "kernel.ptx")
        with open(source, "w") as file:
            file.write(ptx)
        target = re.search(r"\.target (sm_\w+)", ptx).group(1)
        said = subprocess.run(
            [ptxas, "-v", "--gpu-name", target, source, "-o", os.path.join(folder, "kernel.cubin")],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    registers = int(re.search(r"Used (\d+) registers", said).group(1))
    return registers, int(re.search(r"(\d+) bytes spill stores", said).group(1))
