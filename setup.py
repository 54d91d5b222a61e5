"""Everything static is in pyproject.toml; here is only what a table cannot say: csrc/ lands inside the wheel."""

from __future__ import annotations

import os
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py

CSRC = "csrc"


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


setup(cmdclass={"build_py": BuildPyWithCsrc})
