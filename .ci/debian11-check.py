"""Run by .ci/debian11 under Debian 11's Python 3.9: the JIT builds the module there, and two controls show that this
can fail.

With ``--extras pyproject.toml`` (on the outside) it prints the requirements of the extras [jit] and [cuda] instead.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import tempfile
import time

COMPILER = "10.2.1"
GLIBCXX = (3, 4, 28)
SPEC = {"archs": ("9.0",), "world_sizes": (2,), "dtypes": ("bfloat16",)}
BIT_CAST = "#include <bit>\nfloat f(unsigned x) { return std::bit_cast<float>(x); }\n__global__ void k() {}\n"
NO_BIT_CAST = "#include <bit>\nfloat f(unsigned x) { return float(x); }\n__global__ void k() {}\n"


def extras(path: str) -> None:
    """pip cannot be asked for the extras of a wheel without its dependencies."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    for name in ("jit", "cuda"):
        for requirement in re.findall(r'"([^"]+)"', re.search(rf"^{name} = \[(.*?)\]", text, re.M | re.S)[1]):
            print(requirement)


def check(good: bool, what: str) -> None:
    print(f"debian11: {'ok  ' if good else 'FAIL'} {what}", flush=True)
    if not good:
        sys.exit(1)


def version(text: str) -> tuple:
    return tuple(map(int, text.split(".")))


def main(newer: str) -> None:
    started = time.monotonic()
    from extend_attn.jit import load_comm_module
    from extend_attn.jit.toolchain import find_toolchain, newest_glibcxx

    check(sys.version_info[:2] == (3, 9), f"Python {sys.version.split()[0]}")
    check("torch" not in sys.modules, "no torch")
    module = load_comm_module(**SPEC)
    check(True, f"found the compilers, compiled and loaded csrc/ in {time.monotonic() - started:.1f} s")
    tools = find_toolchain()
    info = module.build_info()
    check(info["compiler"].startswith(COMPILER), f"compiled by g++ {info['compiler']}, found as {tools.host.path}")
    check(tools.host.found == "PATH", f"nvcc {tools.nvcc.version} from the {tools.nvcc.found}, C++ {info['cplusplus']}")
    needs = newest_glibcxx(module.__file__)
    check(
        0 < len(needs) and version(needs) <= GLIBCXX, f"the module needs GLIBCXX_{needs}; there is {tools.host.glibcxx}"
    )
    try:
        module.check_aligned(1001)
        refused = ""
    except ValueError as error:
        refused = str(error)
    check("1001" in refused, f"a misaligned pointer is refused: {refused}")
    module.check_aligned(1024)

    command = "import time; t = time.perf_counter(); from extend_attn.jit import load_comm_module as load; "
    command += f"load(**{SPEC!r}); print(round((time.perf_counter() - t) * 1e3))"
    again = subprocess.run(
        [sys.executable, "-c", command], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
    check(True, f"from the cache, in a new process: {again} ms")

    with tempfile.TemporaryDirectory() as folder:
        compiled = {}
        for name, source in (("bit_cast", BIT_CAST), ("no bit_cast", NO_BIT_CAST)):
            path = os.path.join(folder, "control.cu")
            with open(path, "w", encoding="utf-8") as file:
                file.write(source)
            command = [tools.nvcc.path, "-ccbin", tools.host.path, "-std=c++20", "-c", path, "-o", path + ".o"]
            compiled[name] = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = [line for line in compiled["bit_cast"].stdout.splitlines() if "bit_cast" in line]
    check(compiled["no bit_cast"].returncode == 0, "control: C++20 without std::bit_cast compiles")
    check(compiled["bit_cast"].returncode != 0 and bool(said), f"control: std::bit_cast does not: {''.join(said[:1])}")

    needs = newest_glibcxx(newer)
    try:
        ctypes.CDLL(newer)
        refused = ""
    except OSError as error:
        refused = str(error)
    missing = subprocess.run(["ldd", newer], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    named = re.findall(r"`(GLIBCXX_[\d.]+)' not found", missing)
    check(version(needs) > GLIBCXX, f"control: a newer compiler's module needs GLIBCXX_{needs}")
    check("not found" in refused, f"control: it does not load: {refused}")
    check(f"GLIBCXX_{needs}" in named, f"control: ldd misses {', '.join(sorted(set(named)))}")


if __name__ == "__main__":
    extras(sys.argv[2]) if sys.argv[1] == "--extras" else main(sys.argv[1])
