"""``python -m extend_attn.jit.cmake ARCHS DTYPES``: the sources, options and headers of a build, for
CMakeLists.txt, so that the build ahead of time and the one at run time are written down once. Each argument is a list
with commas, or "default"."""

from __future__ import annotations

import sys
from typing import List, Sequence

from . import toolchain as tools
from .spec import (
    ALL_ARCHS,
    DTYPES,
    HOST_FLAGS,
    MODULE,
    NVCC_FLAGS,
    Spec,
    csrc_folder,
    default_archs,
    source_hash,
)


def settings(spec: Spec) -> List[str]:
    """``set(NAME "a" "b")`` of each list that CMakeLists.txt uses."""
    csrc = csrc_folder()
    lists = {
        "MODULE": [MODULE],
        "SOURCES": map(str, spec.sources(csrc)),
        "HOST_FLAGS": HOST_FLAGS,
        "NVCC_FLAGS": [*NVCC_FLAGS, *(flag for arch in spec.archs for flag in arch.flags())],
        "DEFINES": spec.defines(source_hash(csrc)),
        "SYSTEM_INCLUDES": [tools.pybind11_facts()[1]],
    }
    return [f"set(EXTEND_ATTN_{name} {' '.join(map(_quoted, words))})" for name, words in lists.items()]


def _quoted(word: str) -> str:
    """A bracket argument: CMake reads nothing into it."""
    return f"[==[{word}]==]"


def ahead_archs(known: Sequence[str]) -> List[str]:
    """What a build ahead of time is for: EXTEND_ATTN_ARCHS, else all that the kernels and an nvcc with the codes
    ``known`` have in common, the last also as PTX for GPUs to come."""
    given = list(default_archs())
    if given:
        return given
    common = [arch for arch in ALL_ARCHS if arch.replace(".", "") in known]
    return [*common[:-1], f"{common[-1]}+PTX"]


def main(argv: Sequence[str]) -> int:
    """Prints CMake code."""
    archs, types = (None if text == "default" else text.split(",") for text in argv)
    spec = Spec.of(archs or ahead_archs(tools.find_toolchain().nvcc.archs), types or tuple(DTYPES))
    print("\n".join(settings(spec)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
