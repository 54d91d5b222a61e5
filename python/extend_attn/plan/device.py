"""What a plan needs to know about a GPU: plain numbers, so that plans are made and tested without one."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from typing import Dict, Optional, Tuple, Union

KIB = 1024
# Shared memory that one block can opt in to, in bytes ("Technical Specifications per Compute Capability" in the CUDA
# programming guide); HIP's is the LDS of one work group.
SHARED_MEMORY: Dict[Union[str, Tuple[int, int]], int] = {
    "hip": 64 * KIB,
    (7, 0): 96 * KIB,
    (7, 5): 64 * KIB,
    (8, 0): 163 * KIB,
    (8, 6): 99 * KIB,
    (8, 7): 163 * KIB,
    (8, 9): 99 * KIB,
    (9, 0): 227 * KIB,
    (10, 0): 227 * KIB,
    (10, 3): 227 * KIB,
    (11, 0): 227 * KIB,
    (12, 0): 99 * KIB,
    (12, 1): 99 * KIB,
}
# A capability that is not listed is taken to have no more than the smallest of the current ones.
SHARED_MEMORY_UNKNOWN = 99 * KIB


@dataclass(frozen=True)
class DeviceSpec:
    """A GPU in plain numbers.

    ``name`` as the driver reports it, ``capability`` (major, minor) or "hip", ``shared_memory`` the bytes one block
    can opt in to, ``registers`` the 32-bit registers of one multiprocessor, ``warp_size`` in threads, ``triton`` the
    version in use ("" if not known: taken to be a recent one), ``interpreted`` whether Triton's interpreter stands in
    for the GPU. Raises ValueError naming the field.
    """

    name: str
    capability: Union[str, Tuple[int, int]]
    sm_count: int
    shared_memory: int
    registers: int = 65536
    warp_size: int = 32
    triton: str = ""
    interpreted: bool = False

    def __post_init__(self) -> None:
        if self.capability != "hip":
            pair = self.capability
            if isinstance(pair, str) or len(pair) != 2 or not all(type(n) is int and n >= 0 for n in pair):
                raise ValueError(f"capability: got {pair!r}; expected a pair (major, minor) or 'hip'")
            object.__setattr__(self, "capability", (pair[0], pair[1]))
        for name in ("sm_count", "shared_memory", "registers", "warp_size"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected an integer of at least 1")

        if self.triton and not re.match(r"\d+\.\d+", self.triton):
            raise ValueError(f"triton: got {self.triton!r}; expected a version such as '3.6.0', or '' if not known")

    @property
    def arch(self) -> str:
        """Name of the architecture, as files and options spell it: "sm_90", or "hip"."""
        return "hip" if isinstance(self.capability, str) else f"sm_{self.capability[0]}{self.capability[1]}"

    def triton_at_least(self, major: int, minor: int) -> bool:
        """Whether Triton is of at least that version; one that is not known counts as recent."""
        return not self.triton or tuple(int(n) for n in self.triton.split(".")[:2]) >= (major, minor)

    def at_least(self, major: int, minor: int = 0) -> bool:
        """Whether this is an NVIDIA GPU of at least that compute capability."""
        return not isinstance(self.capability, str) and self.capability >= (major, minor)

    @classmethod
    def preset(cls, name: str, *, sm_count: Optional[int] = None) -> DeviceSpec:
        """The device of a short name: a product ("h200", "a100", "l40s", ...), an architecture ("sm_90") or "hip".

        An architecture stands for its best known product. One that is not listed ("sm_130") gets 128 multiprocessors
        and the smallest shared memory of the current ones, so that what is planned for it also fits. ``triton`` is the
        version that is installed here. ValueError for a name that is neither.
        """
        key = re.sub(r"^sm_?(?=\d)", "sm_", name.strip().lower())
        key = _ARCH_PRODUCT.get(key, key)
        if key in _PRODUCTS:
            spec = _PRODUCTS[key]
        else:
            match = re.fullmatch(r"sm_?(\d{1,2})(\d)a?", key)
            if not match:
                known = ", ".join(sorted((*_PRODUCTS, *_ARCH_PRODUCT)))
                raise ValueError(f"device: got {name!r}; known are {known}, and any sm_<major><minor>")
            capability = (int(match.group(1)), int(match.group(2)))
            shared = SHARED_MEMORY.get(capability, SHARED_MEMORY_UNKNOWN)
            spec = cls(f"generic sm_{match.group(1)}{match.group(2)}", capability, 128, shared)
        return replace(spec, sm_count=sm_count or spec.sm_count, triton=installed_triton())

    @staticmethod
    def preset_names() -> Tuple[str, ...]:
        """The names that ``preset`` knows, architectures first."""
        return (*sorted(_ARCH_PRODUCT, key=lambda arch: (len(arch), arch)), *sorted(_PRODUCTS))


@cache
def installed_triton() -> str:
    """The installed Triton's version, read from its metadata without importing it; "" if there is none."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""
    return version if re.match(r"\d+\.\d+", version) else ""


def _nvidia(name: str, capability: Tuple[int, int], sm_count: int) -> DeviceSpec:
    return DeviceSpec(name, capability, sm_count, SHARED_MEMORY[capability])


_PRODUCTS: Dict[str, DeviceSpec] = {
    "v100": _nvidia("Tesla V100-SXM2-16GB", (7, 0), 80),
    "t4": _nvidia("Tesla T4", (7, 5), 40),
    "a100": _nvidia("NVIDIA A100-SXM4-80GB", (8, 0), 108),
    "a10": _nvidia("NVIDIA A10", (8, 6), 72),
    "rtx3090": _nvidia("NVIDIA GeForce RTX 3090", (8, 6), 82),
    "orin": _nvidia("Orin", (8, 7), 16),
    "l4": _nvidia("NVIDIA L4", (8, 9), 58),
    "l40s": _nvidia("NVIDIA L40S", (8, 9), 142),
    "rtx4090": _nvidia("NVIDIA GeForce RTX 4090", (8, 9), 128),
    "h100": _nvidia("NVIDIA H100 80GB HBM3", (9, 0), 132),
    "h200": _nvidia("NVIDIA H200", (9, 0), 132),
    "b200": _nvidia("NVIDIA B200", (10, 0), 148),
    "b300": _nvidia("NVIDIA B300", (10, 3), 148),
    "rtx5090": _nvidia("NVIDIA GeForce RTX 5090", (12, 0), 170),
    "gb10": _nvidia("NVIDIA GB10", (12, 1), 48),
    "mi300x": DeviceSpec("AMD Instinct MI300X", "hip", 304, SHARED_MEMORY["hip"], registers=131072, warp_size=64),
}
_ARCH_PRODUCT: Dict[str, str] = {
    "sm_70": "v100",
    "sm_75": "t4",
    "sm_80": "a100",
    "sm_86": "rtx3090",
    "sm_87": "orin",
    "sm_89": "l40s",
    "sm_90": "h100",
    "sm_100": "b200",
    "sm_103": "b300",
    "sm_120": "rtx5090",
    "sm_121": "gb10",
    "hip": "mi300x",
}
