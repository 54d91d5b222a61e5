"""``python -m extend_attn doctor``: what is installed, on which devices, with which settings, and what is wrong."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
from importlib import metadata
from typing import Any, Dict, List, Optional

import extend_attn

NEEDED = ("torch", "triton")
# Distribution -> what it is for.
OPTIONAL = {
    "rich": "progress bars",
    "matplotlib": "bench --plot",
    "numpy": "Triton's interpreter",
    "pybind11": "compiling csrc/",
    "ninja": "compiling csrc/",
    "flashinfer-python": "bench baseline",
    "flash-attn": "bench baseline",
    "sglang": "bench baseline",
}
OLDEST_TRITON = (3, 2)
SETTINGS = ("EXTEND_ATTN_", "TRITON_", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def version_of(distribution: str) -> Optional[str]:
    """The installed version, without an import; None if it is absent."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def devices() -> List[Dict[str, Any]]:
    """Name, architecture, SMs, memory (bytes) and shared memory a block may have (bytes) of each GPU torch sees."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": p.name,
                "capability": getattr(p, "gcnArchName", None) if torch.version.hip else f"sm_{p.major}{p.minor}",
                "sm_count": p.multi_processor_count,
                "memory": p.total_memory,
                "shared_memory": getattr(p, "shared_memory_per_block_optin", None),
            }
        )
    return found


def report() -> Dict[str, Any]:
    """All that the command prints, as plain data; ``problems`` lists what keeps the library from working."""
    versions = {name: version_of(name) for name in (*NEEDED, *OPTIONAL)}
    problems: List[str] = []
    gpus: List[Dict[str, Any]] = []
    build: Dict[str, Any] = {}
    if importlib.util.find_spec("torch") is None:
        problems.append("torch is not installed: pip install 'torch>=2.6'")
    else:
        try:
            import torch

            versions["torch"] = torch.__version__
            build = {"cuda": torch.version.cuda, "hip": torch.version.hip}
            gpus = devices()
        except Exception as error:  # a broken installation or driver is what a doctor is asked about
            problems.append(f"torch cannot be used: {type(error).__name__}: {error}")
    problems += _triton_problems(versions["triton"])
    return {
        "extend_attn": extend_attn.__version__,
        "installed_at": os.path.dirname(os.path.abspath(extend_attn.__file__)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "torch_build": build,
        "devices": gpus,
        "folders": folders(),
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith(SETTINGS)},
        "problems": problems,
    }


def _triton_problems(version: Optional[str]) -> List[str]:
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed: without it only the PyTorch reference runs, on CPU tensors"]
    if version is not None and tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return [f"triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}; install the pair of torch>=2.6"]
    return []


def folders() -> Dict[str, str]:
    """Where kernels are kept and measured plans are read from."""
    from extend_attn.comm import policy
    from extend_attn.plan import tables

    home = os.environ.get("TRITON_HOME", os.path.expanduser("~"))
    return {
        "compiled kernels": os.environ.get("TRITON_CACHE_DIR", os.path.join(home, ".triton", "cache")),
        "user's table": tables.user_table_path() or _absent(tables.USER_FILE),
        "measured tables": str(tables.PACKAGED),
        "user's all-reduce": tables.user_file(None, policy.ENVIRONMENT, policy.USER_FILE) or _absent(policy.USER_FILE),
    }


def _absent(name: str) -> str:
    from extend_attn.plan import tables

    return f"none ({tables.user_folder() / name} is not there)"


def _lines(data: Dict[str, Any]) -> List[str]:
    lines = [f"extend-attn {data['extend_attn']} at {data['installed_at']}"]
    lines += [f"Python {data['python']} on {data['platform']}", "", "packages"]
    for name, version in data["versions"].items():
        why = "" if name in NEEDED else f"  ({OPTIONAL[name]})"
        lines.append(f"  {name:18} {version or 'absent'}{why}")
    lines += ["", "devices"]
    for d in data["devices"]:
        shared = "" if d["shared_memory"] is None else f", {d['shared_memory'] // 1024} KiB shared memory a block"
        size = f"{d['sm_count']} SMs, {d['memory'] >> 30} GiB{shared}"
        lines.append(f"  {d['index']}: {d['name']}, {d['capability']}, {size}")
    if not data["devices"]:
        lines.append("  none: CPU tensors run on the PyTorch reference (TRITON_INTERPRET=1: interpreted kernels)")
    for title in ("folders", "settings"):
        lines += ["", title]
        lines += [f"  {name:18} {value}" for name, value in data[title].items()] or ["  none"]
    lines += ["", "problems"]
    lines += [f"  {problem}" for problem in data["problems"]] or ["  none"]
    return lines


def main(argv: Optional[List[str]] = None) -> int:
    """Returns 0, or 1 if something keeps the library from working."""
    parser = argparse.ArgumentParser(
        prog="python -m extend_attn doctor",
        description="What is installed, on which devices, with which settings; exits with 1 if something is wrong.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    data = report()
    print(json.dumps(data, indent=1) if args.json else "\n".join(_lines(data)))
    return 1 if data["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
