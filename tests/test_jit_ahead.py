"""EXTEND_ATTN_AOT=1: the wheel brings the module, and neither compilers nor the cache are then looked at."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from jit_env import ROOT, needs_compilers

LOAD = """
from extend_attn.jit import JitError, load_comm_module
module = load_comm_module(archs=("9.0",), dtypes=("bfloat16",))
print(module.__name__, module.build_info()["cplusplus"], module.build_info()["archs"])
try:
    load_comm_module(archs=("8.0",))
except JitError as error:
    print(error)
"""


@pytest.fixture
def installed(tmp_path):
    """A folder with the package as ``EXTEND_ATTN_AOT=1 pip install .`` installs it, for one architecture."""
    needs_compilers()
    if not shutil.which("cmake"):
        pytest.skip("needs cmake")
    pytest.importorskip("setuptools", minversion="77")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    for name in ("python", "csrc"):
        shutil.copytree(
            ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
        )
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    environment = {**os.environ, "EXTEND_ATTN_AOT": "1", "EXTEND_ATTN_ARCHS": "9.0"}
    done = subprocess.run(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout
    (wheel,) = (checkout / "out").glob("*.whl")
    assert "-none-any" not in wheel.name  # it is for one Python and one platform
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    return tmp_path / "site"


def test_an_installed_module_needs_no_compiler(installed, tmp_path):
    environment = {
        "PYTHONPATH": os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PATH": str(tmp_path / "nothing"),
        "EXTEND_ATTN_CACHE_DIR": str(tmp_path / "cache"),
        "HOME": str(tmp_path),
    }
    command = [sys.executable, "-c", LOAD]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[:2]
    assert first == "extend_attn._comm 201703 9.0"
    assert "no C++ compiler" in second  # for what the module does not hold, the JIT is asked
    assert not (tmp_path / "cache" / "modules").exists()


def test_the_build_environment_gets_the_extra_jit():
    """setup.py names what pyproject.toml's extra holds, since pip asks it before anything is installed."""
    extra = re.search(r"^jit = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    required = re.search(r"^AHEAD_REQUIRES = \[(.*?)\]", (ROOT / "setup.py").read_text(encoding="utf-8"), re.M)[1]
    assert set(re.findall(r'"([^"]+)"', required)) == {"cmake>=3.18", *re.findall(r'"([^"]+)"', extra)}
