"""Run by .ci/debian11 under Debian 11's Python 3.9: the JIT builds the module there, and two controls show that this
can fail.

With ``--extras pyproject.toml`` (on the outside) it prints the requirements of the extras [jit] and [cuda] instead.
"""

from __future__ import annotations

import ctypes
import glob
import os
import re
import subprocess
import sys
import tempfile
import time

COMPILER = "10.2.1"
GLIBCXX = (3, 4, 28)
SPEC = {"archs": ("9.0",), "dtypes": ("bfloat16",)}
HERE = os.path.dirname(os.path.abspath(__file__))
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


def ahead(tools, info: dict) -> None:
    """CMakeLists.txt with Debian 11's CMake builds the same module."""
    started = time.monotonic()
    said = subprocess.run(["cmake", "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout.split()[2]
    with tempfile.TemporaryDirectory() as folder:
        archs, types = (",".join(map(str, words)) for words in SPEC.values())
        command = [
            "cmake",
            "-S",
            os.path.join(HERE, "checkout"),
            "-B",
            folder,
            "-G",
            "Ninja",
            f"-DEXTEND_ATTN_ARCHS={archs}",
        ]
        command += [f"-DEXTEND_ATTN_DTYPES={types}", "-DCMAKE_CXX_COMPILER=g++"]
        command += [
            f"-DCMAKE_CUDA_COMPILER={tools.nvcc.path}",
            f"-DCMAKE_CUDA_FLAGS=-L{os.path.dirname(tools.nvcc.cudart)}",
        ]
        for step in (command, ["cmake", "--build", folder]):
            done = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                check(False, f"{' '.join(step)}:\n{done.stdout}")
        sys.path.insert(0, folder)
        import _comm

        check(_comm.build_info() == info, f"CMake {said} builds the same in {time.monotonic() - started:.1f} s")


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

    ahead(tools, info)

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
    # dlopen names the first version that is missing (glibc's own, here); the loader's --list, which ldd is made of,
    # names all.
    (loader,) = glob.glob("/lib*/ld-linux-*.so.*")[:1]
    missing = subprocess.run(
        [loader, "--list", newer], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ).stdout
    named = re.findall(r"`(GLIBCXX_[\d.]+)' not found", missing)
    check(version(needs) > GLIBCXX, f"control: a newer compiler's module needs GLIBCXX_{needs}")
    check("not found" in refused, f"control: it does not load: {refused}")
    check(f"GLIBCXX_{needs}" in named, f"control: the loader misses {', '.join(sorted(set(named)))}")


if __name__ == "__main__":
    extras(sys.argv[2]) if sys.argv[1] == "--extras" else main(sys.argv[1])
