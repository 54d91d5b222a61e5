"""``python -m extend_attn jit build|info|clean``: compile csrc/, show with what and where it is kept, remove it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from typing import Any, Callable, Dict, List, Optional

from extend_attn.jit import JitError, cache, devices, modules, toolchain
from extend_attn.jit.spec import DTYPES


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch", action="append", help="compute capability, such as 9.0; repeat for several; by default the GPUs' own"
    )
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="default: %(default)s")


def _add_compilers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nvcc", help="by default CUDA_HOME, CUDA_PATH, PATH, PyPI's packages")
    parser.add_argument("--cxx", help="by default CXX, then g++")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m extend_attn jit", description="The C++/CUDA half of the library, compiled on this machine."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="build|info|clean")
    build = commands.add_parser("build", help="compile now what a process would compile when it needs it")
    _add_selection(build)
    _add_compilers(build)
    build.add_argument("--print-path", action="store_true", help="print the module's path and nothing else")
    info = commands.add_parser("info", help="compilers, cache folder, what is in it")
    _add_compilers(info)
    info.add_argument("--json", action="store_true", help="print JSON")
    commands.add_parser("clean", help="remove what was compiled and what is known of compilers")
    return parser


def _build(args: argparse.Namespace) -> int:
    if not args.print_path:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    spec = modules.make_spec(args.arch, args.dtypes.split(","))
    started = time.monotonic()
    path = modules.build_module(spec, nvcc=args.nvcc, cxx=args.cxx)
    if args.print_path:
        print(path)
    else:
        print(f"{path}\n{os.path.getsize(path)} bytes, ready after {time.monotonic() - started:.1f} s")
    return 0


def compilers(nvcc: Optional[str] = None, cxx: Optional[str] = None) -> Dict[str, Any]:
    """What a build would use here, as plain data; ``problem`` says why there can be none, None if there can."""
    found: Dict[str, Any] = {"nvcc": None, "host": None, "ninja": None, "pybind11": None, "problem": None}
    steps: Dict[str, Callable[[], Any]] = {
        "ninja": toolchain.find_ninja,
        "pybind11": lambda: toolchain.pybind11_facts()[0],
        "python": toolchain.python_include,
    }
    try:
        found.update(toolchain.facts(toolchain.find_toolchain(nvcc, cxx)))
        for name, step in steps.items():
            found[name] = step()
    except JitError as error:
        found["problem"] = str(error)
    return found


def driver_problem(nvcc: Optional[Dict[str, Any]]) -> Optional[str]:
    """Why what this nvcc compiles cannot run on this machine's driver; None if it can or there is no driver."""
    newest = devices.driver_cuda_version()
    if not nvcc or not newest or int(nvcc["version"].split(".")[0]) <= newest[0]:
        return None
    return (
        f"nvcc {nvcc['version']} compiles for a newer CUDA than the driver runs ({newest[0]}.{newest[1]}): "
        f"update the driver or set CUDA_HOME to a CUDA {newest[0]} toolkit"
    )


def report(nvcc: Optional[str] = None, cxx: Optional[str] = None) -> Dict[str, Any]:
    """All that ``jit info`` prints, as plain data."""
    try:
        gpus: Any = devices.gpu_archs()
    except JitError:
        gpus = ()
    installed = modules.installed()
    folders = [str(root) for root in cache.roots()]
    return {
        "compilers": compilers(nvcc, cxx),
        "gpus": gpus,
        "installed": installed.build_info() if installed else None,
        "folders": folders,
        "builds": [entry for root in cache.roots() for entry in cache.entries(root)],
    }


def compiler_lines(found: Dict[str, Any]) -> List[str]:
    """The compilers as ``jit info`` and ``doctor`` print them."""
    lines = []
    for name in ("nvcc", "host"):
        if found[name]:
            more = f", libstdc++ {found[name]['glibcxx']}" if name == "host" else ""
            lines.append(
                f"  {name:18} {found[name]['path']} {found[name]['version']} (from {found[name]['found']}{more})"
            )
    lines += [f"  {name:18} {found[name]}" for name in ("ninja", "pybind11") if found[name]]
    return lines + ([f"  cannot compile: {found['problem']}"] if found["problem"] else [])


def _lines(data: Dict[str, Any]) -> List[str]:
    lines = ["compilers", *compiler_lines(data["compilers"]), "", "GPUs"]
    lines.append(f"  {', '.join(data['gpus']) or 'none: name the architectures (--arch, EXTEND_ATTN_ARCHS)'}")
    installed = data["installed"]
    lines += ["", "installed module (compiled ahead)"]
    lines.append(f"  {installed['archs']}, g++ {installed['compiler']}" if installed else "  none")
    lines += ["", "cache", *(f"  {folder}" for folder in data["folders"])]
    for build in data["builds"]:
        selection = f"{build['archs']}, {', '.join(build['dtypes'])}"
        lines.append(
            f"  {build['key'][:12]}  {build['made']}  {build['bytes']} bytes  {build['seconds']} s  {selection}"
        )
    return lines


def _info(args: argparse.Namespace) -> int:
    data = report(args.nvcc, args.cxx)
    print(json.dumps(data, indent=1) if args.json else "\n".join(_lines(data)))
    return 1 if data["compilers"]["problem"] and not data["installed"] else 0


def _clean(args: argparse.Namespace) -> int:
    for root in cache.roots():
        if root.exists():
            gone, kept = cache.clean(root)
            print(f"{root}: {len(gone)} removed" + (f", {len(kept)} being built and kept" if kept else ""))
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    """Returns 0; 1 if nothing can be compiled here; 2 through argparse for wrong usage."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return {"build": _build, "info": _info, "clean": _clean}[args.command](args)
    except ValueError as error:
        parser.error(str(error))
    except JitError as error:
        print(f"extend_attn jit: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
