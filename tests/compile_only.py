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

from extend_attn.kernels.launch import kernels_of
from extend_attn.plan.tile import Plan
from extend_attn.problem import Problem
from extend_attn.warming import stand_ins


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


def compile_plan(problem: Problem, plan: Plan, arch: int, *, resources: bool = False) -> List[Compiled]:
    """Compiles what ``plan`` launches for sm_``arch``; ``resources`` adds registers and spills (sm_80 to sm_90)."""
    found = []
    with architecture(arch):
        inputs = stand_ins(problem, torch.device("meta"))[0]
        for kernel, grid, arguments, constants in kernels_of(plan, inputs, problem):
            compiled = kernel.warmup(*arguments, grid=grid, **constants)
            ptx = compiled.asm["ptx"]
            registers, spills = _resources(ptx, arch) if resources else (None, None)
            found.append(Compiled(kernel.__name__, compiled.metadata.shared, registers, spills, ptx))
    return found


def _resources(ptx: str, arch: int) -> tuple:
    import triton.backends.nvidia as nvidia

    folder = os.path.join(os.path.dirname(nvidia.__file__), "bin")
    target = re.search(r"\.target (sm_\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as scratch:
        source = os.path.join(scratch, "kernel.ptx")
        with open(source, "w") as file:
            file.write(ptx)
        for ptxas in ("ptxas", "ptxas-blackwell"):  # the second where Triton writes PTX too new for the first
            command = [os.path.join(folder, ptxas), "-v", "--gpu-name", target, source, "-o", source + ".cubin"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                break
    assert done.returncode == 0, done.stderr
    said = done.stderr
    registers = int(re.search(r"Used (\d+) registers", said).group(1))
    return registers, int(re.search(r"(\d+) bytes spill stores", said).group(1))
