"""Compiles the kernels of csrc/ and runs none: every architecture with ``--all``, from the command line or CI; a sample
in pytest.

    python tests/compile_csrc.py --all
    python tests/compile_csrc.py --arch 7.5 --arch 12.0 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Sequence

from extend_attn.jit.build import Build, run_ninja
from extend_attn.jit.spec import ALL_ARCHS, DTYPES, Spec, csrc_folder
from extend_attn.jit.toolchain import find_toolchain


def compile_kernels(archs: Sequence[str], dtypes: Sequence[str]) -> int:
    """Each .cu for all of ``archs``, with the JIT's own commands; returns how many. BuildError with the compiler's
    words."""
    build = Build(Spec.of(archs, dtypes), find_toolchain(), csrc_folder())
    build.toolchain.nvcc.check_archs(build.spec.archs)
    objects = [build.object_name(source) for source in build.spec.sources(build.csrc) if source.suffix == ".cu"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "build.ninja").write_text(build.ninja_file(), encoding="utf-8")
        run_ninja(Path(folder), objects)
    return len(objects)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help=f"every architecture ({', '.join(ALL_ARCHS)}) and type")
    parser.add_argument("--arch", action="append", default=[])
    parser.add_argument("--dtype", action="append", default=[], choices=list(DTYPES))
    args = parser.parse_args()
    archs = list(ALL_ARCHS) if args.all else args.arch or ["9.0"]
    for arch in archs:
        started = time.monotonic()
        count = compile_kernels([arch], args.dtype or list(DTYPES))
        print(f"sm_{arch.replace('.', '')}: {count} files in {time.monotonic() - started:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
