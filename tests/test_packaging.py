"""The distribution: what importing costs, what a wheel holds, which versions are promised together."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import extend_attn

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, *options: str) -> str:
    """stdout of a fresh interpreter that sees the package as this one does."""
    path = os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PROBLEM = (
    "dict(dtype='bfloat16', head_dim_qk=128, head_dim_v=128, num_q_heads=8, num_kv_heads=4, batch_size=1, num_tokens=1,"
    " max_len_extend=1, num_kv_indices=1)"
)


@pytest.mark.parametrize(
    "statement",
    [
        "import extend_attn",
        "import extend_attn; extend_attn.__version__; dir(extend_attn)",
        "import extend_attn.plan",
        "import extend_attn; extend_attn.Problem",
        f"import extend_attn; extend_attn.select_plan(extend_attn.Problem(**{PROBLEM}), 'h100')",
        f"import extend_attn; str(extend_attn.explain(extend_attn.Problem(**{PROBLEM}), 'sm_80'))",
        "import extend_attn.__main__",
        "import extend_attn.cli.explain",
    ],
)
def test_needs_neither_torch_nor_triton(statement):
    heavy = "('torch', 'triton', 'numpy', 'rich')"
    loaded = run_python(f"{statement}\nimport sys; print([m for m in {heavy} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_works_where_torch_cannot_be_imported():
    code = f"""
import sys
sys.modules["torch"] = sys.modules["triton"] = None  # an import of either raises ImportError
import extend_attn
problem = extend_attn.Problem(**{PROBLEM})
print(extend_attn.select_plan(problem, "h100").source)
try:
    extend_attn.select_plan(problem)
except RuntimeError as error:
    print(error)
"""
    source, message = run_python(code).splitlines()
    assert source
    assert message.startswith("device: ") and "h100" in message


def test_import_creates_no_cuda_context():
    code = "import extend_attn, torch; extend_attn.Problem; print(torch.cuda.is_initialized())"
    assert run_python(code).strip() == "False"


@pytest.mark.parametrize("name", [n for n in extend_attn.__all__ if n != "__version__"])
def test_public_names(name):
    """Each name is found lazily, listed by dir(), and is a function or class, not a module of the same name."""
    value = getattr(extend_attn, name)
    assert callable(value)
    assert name in dir(extend_attn)
    assert getattr(value, "__doc__", None), f"{name} has no docstring"


def test_names_survive_every_submodule_import():
    """Importing a submodule binds it to the package's attribute of its name; no public name may be lost that way."""
    code = """
import importlib, pkgutil, extend_attn
for module in pkgutil.iter_modules(extend_attn.__path__):
    if module.name != "__main__":
        importlib.import_module("extend_attn." + module.name)
print([n for n in extend_attn.__all__ if n != "__version__" and not callable(getattr(extend_attn, n))])
"""
    assert run_python(code).strip() == "[]"


def test_unknown_name():
    with pytest.raises(AttributeError, match="no_such_name"):
        extend_attn.no_such_name  # noqa: B018


def test_type_checkers_see_what_runs():
    """Every lazily exported name is also imported under TYPE_CHECKING, and only those are."""
    import ast

    tree = ast.parse((ROOT / "python/extend_attn/__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {alias.name for node in block.body for alias in node.names}
    assert seen == set(extend_attn._HOME) == set(extend_attn.__all__) - {"__version__"}
    for name, module in extend_attn._HOME.items():
        assert hasattr(importlib.import_module(f"extend_attn.{module}"), name)


def build(folder: Path, kind: str) -> Path:
    """Builds a wheel or sdist of the checkout in ``folder`` with the tools that are installed."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", "out", "."]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert done.returncode == 0, done.stdout.decode()
    return next((folder / "out").iterdir())


@pytest.fixture
def copy_of_checkout(tmp_path):
    """The files that a build reads, without what earlier builds left."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md",
                 "constraints.txt", "CMakeLists.txt", "dev"):  # fmt: skip
        shutil.copy(ROOT / name, folder / name)
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.pyc")
    for name in ("python", "csrc"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=skip)
    return folder


def test_wheel_holds_the_package_and_csrc(copy_of_checkout):
    source = copy_of_checkout / "csrc" / "portability" / "packaging_probe.h"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("#pragma once\n")
    (source.parent / "stale.o").write_text("")
    names = set(zipfile.ZipFile(build(copy_of_checkout, "wheel")).namelist())
    package = copy_of_checkout / "python" / "extend_attn"
    modules = {str(p.relative_to(package.parent)) for p in package.rglob("*.py")}
    tables = {str(p.relative_to(package.parent)) for p in package.rglob("plan/tables/*.json")}
    assert modules <= names
    assert tables <= names
    assert {"extend_attn/py.typed", "extend_attn/csrc/portability/packaging_probe.h"} <= names
    assert not [n for n in names if n.endswith((".o", ".pyc")) or n.startswith(("tests", "csrc"))]
    assert [n for n in names if n.endswith("licenses/LICENSE")]


def test_sdist_holds_what_a_wheel_is_built_from(copy_of_checkout):
    source = copy_of_checkout / "csrc" / "kernels" / "packaging_probe.cuh"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("#pragma once\n")
    import tarfile

    with tarfile.open(build(copy_of_checkout, "sdist")) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"setup.py", "pyproject.toml", "LICENSE", "constraints.txt", "csrc/kernels/packaging_probe.cuh"} <= names
    assert "python/extend_attn/py.typed" in names


def _constraints() -> dict:
    """Package -> {environment marker: pinned version}."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line:
            requirement, _, marker = line.partition(";")
            name, version = requirement.strip().split("==")
            pins.setdefault(name, {})[marker.strip()] = version
    return pins


def test_constraints_pin_a_true_pair():
    """torch's CUDA builds require one Triton version exactly: another would make the file impossible to install."""
    pins = _constraints()
    pairs = {"2.13.0": "3.7.1", "2.8.0": "3.4.0"}
    assert sorted(pins["torch"].values()) == sorted(pairs)
    for marker, version in pins["torch"].items():
        assert pins["triton"][f'{marker} and platform_system == "Linux"'] == pairs[version]


def test_no_file_names_an_index_or_a_machine():
    """Nothing in the tree may depend on where it was written."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if listed.returncode:
        pytest.skip("not a git checkout")
    forbidden = ["/wor" + "k/", "/ro" + "ot/", "/home" + "/", "index" + "-url", "/op" + "t/wheels", "local" + "host:"]
    found = []
    for name in listed.stdout.decode().split():
        path = ROOT / name
        if path.is_file() and path.suffix in {"", ".py", ".md", ".toml", ".txt", ".yml", ".json", ".in"}:
            text = path.read_text(encoding="utf-8")
            found += [f"{name}: {word}" for word in forbidden if word in text]
    assert not found


def test_dev_script_explains_itself():
    done = subprocess.run(["bash", "dev"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert "./dev demo" in done.stdout and "./dev test" in done.stdout
    assert subprocess.run(["bash", "dev", "no-such-command"], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 2


def test_version_is_the_changelogs_newest():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = next(line.split()[1] for line in text.splitlines() if line.startswith("## "))
    assert newest == extend_attn.__version__


def test_results_of_json_tables_parse():
    """A table that does not parse would only be missed at run time, on the machine that it is for."""
    for path in (ROOT / "python/extend_attn/plan/tables").glob("*.json"):
        assert isinstance(json.loads(path.read_text(encoding="utf-8")), dict), path.name
