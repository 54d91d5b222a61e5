"""Which GPUs this process sees, asked of the driver: torch is not needed to know what to compile for."""

from __future__ import annotations

import ctypes
import subprocess
from typing import List, Optional, Tuple

from .errors import ToolchainError

# CUdevice_attribute: compute capability
_MAJOR, _MINOR = 75, 76
NVIDIA_SMI_SECONDS = 30


def _driver() -> Optional[ctypes.CDLL]:
    """libcuda, initialised (no context is made); None where there is no driver or no GPU."""
    for name in ("libcuda.so.1", "libcuda.so"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        return library if library.cuInit(0) == 0 else None
    return None


def _from_driver() -> List[Tuple[int, int]]:
    cuda = _driver()
    if cuda is None:
        return []
    count = ctypes.c_int(0)
    cuda.cuDeviceGetCount(ctypes.byref(count))
    found = []
    for ordinal in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        found.append((major.value, minor.value))
    return found


def _from_nvidia_smi() -> List[Tuple[int, int]]:
    """A container may have the tool and not the library."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS)
        return [tuple(map(int, line.split("."))) for line in done.stdout.split()] if done.returncode == 0 else []
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return []


def gpu_archs() -> Tuple[str, ...]:
    """The different compute capabilities of the GPUs that this process sees, such as ("9.0",). ToolchainError if there
    are none."""
    found = sorted(set(_from_driver() or _from_nvidia_smi()))
    if not found:
        raise ToolchainError(
            "archs: no GPU to compile for (asked the driver libcuda.so.1, then nvidia-smi): name the compute "
            "capabilities, archs=('9.0',) or EXTEND_ATTN_ARCHS=9.0"
        )
    return tuple(f"{major}.{minor}" for major, minor in found)


def driver_cuda_version() -> Optional[Tuple[int, int]]:
    """The newest CUDA (major, minor) that the driver runs; None without a driver."""
    cuda = _driver()
    version = ctypes.c_int(0)
    if cuda is None or cuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10
