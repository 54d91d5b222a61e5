"""Everything static is in pyproject.toml; here is only what a table cannot say: csrc/ lands inside the wheel, and with
EXTEND_ATTN_AOT=1 in the environment the module compiled from it does too (extend_attn/_comm.*.so, by CMakeLists.txt;
for the architectures in EXTEND_ATTN_ARCHS, such as "9.0 10.0", or all)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CSRC = "csrc"
AHEAD = os.environ.get("EXTEND_ATTN_AOT", "0") not in ("", "0")
# What pip installs into the environment that it builds in: CMake and the extra [jit], whose discovery of compilers is
# used.
AHEAD_REQUIRES = ["cmake>=3.18", "pybind11>=2.12", "ninja>=1.10", "filelock>=3.12", "platformdirs>=3"]


class BuildPyWithCsrc(build_py):
    """Copies csrc/ to extend_attn/csrc, so that an installed package can compile its C++/CUDA sources.

    An editable install has the checkout's csrc/ and copies nothing.
    """

    def _csrc_files(self):
        """(source, destination) of each file below csrc/; hidden and compiled files stay out."""
        pairs = []
        for folder, subfolders, names in os.walk(CSRC):
            subfolders[:] = sorted(s for s in subfolders if not s.startswith((".", "__")) and s != "build")
            target = os.path.join(self.build_lib, "extend_attn", folder)
            pairs += [
                (os.path.join(folder, name), os.path.join(target, name))
                for name in sorted(names)
                if not name.startswith(".") and not name.endswith((".o", ".so", ".pyc"))
            ]
        return pairs

    def run(self):
        super().run()
        if not getattr(self, "editable_mode", False):
            for source, target in self._csrc_files():
                self.mkpath(os.path.dirname(target))
                shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode=True):
        return super().get_outputs(include_bytecode) + [target for _, target in self._csrc_files()]


class BuildExtWithCMake(build_ext):
    """Runs CMakeLists.txt with the compilers that the JIT would use."""

    def build_extension(self, ext):
        sys.path.insert(0, os.path.abspath("python"))
        from extend_attn.jit.toolchain import find_ninja, find_toolchain

        tools = find_toolchain()
        folder = os.path.abspath(self.build_temp)
        target = os.path.abspath(self.get_ext_fullpath(ext.name))
        configure = ["cmake", "-S", os.path.dirname(os.path.abspath(__file__)), "-B", folder, "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={find_ninja()}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DCMAKE_CXX_COMPILER={tools.host.path}", f"-DCMAKE_CUDA_COMPILER={tools.nvcc.path}"]
        # PyPI's toolkit keeps its libraries where its own nvcc does not look.
        configure += [f"-DCMAKE_CUDA_FLAGS=-L{os.path.dirname(tools.nvcc.cudart)}"]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", folder], check=True)
        self.mkpath(os.path.dirname(target))
        shutil.copyfile(os.path.join(folder, os.path.basename(target)), target)


if AHEAD:
    setup(
        cmdclass={"build_py": BuildPyWithCsrc, "build_ext": BuildExtWithCMake},
        ext_modules=[Extension("extend_attn._comm", sources=[])],
        setup_requires=AHEAD_REQUIRES,
    )
else:
    setup(cmdclass={"build_py": BuildPyWithCsrc})
