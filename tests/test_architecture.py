"""The arrows between modules, read from their imports; sizes of files; what the README promises."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, Set, Tuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "extend_attn"
MAX_LINES = 400

# Unit (a module or subpackage of extend_attn) -> units it may import. What is not listed here is not there.
ARROWS: Dict[str, Set[str]] = {
    "problem": set(),
    "plan": {"problem"},
    "devices": {"plan"},
    "selection": {"plan", "problem", "devices"},
    "inputs": {"problem"},
    "checks": {"inputs"},
    "guards": {"inputs"},
    "calls": {"guards", "inputs", "plan", "problem"},
    "reference": {"inputs"},
    "kernels": {"plan", "problem", "inputs"},  # for the types of what it is given
    "attention": {"calls", "inputs", "problem", "plan", "devices", "checks", "reference", "kernels"},
    "jit": set(),
    "comm": {"plan", "jit"},  # plan: how table files are found and read
    "ops": {"comm"},
    "warming": {"attention", "inputs", "problem", "plan", "devices", "kernels"},
    # Users of the public interface; nothing imports them.
    "bench": {"attention", "reference", "inputs", "problem", "plan", "devices", "selection", "warming", "comm", "ops"},
    "cli": {"attention", "reference", "problem", "plan", "selection", "warming", "bench", "comm", "jit"},
    "__main__": {"cli", "bench"},
    # The package itself fetches its names when they are used; its imports are for type checkers.
    "__init__": {"attention", "checks", "ops", "plan", "problem", "selection", "warming"},
}
TORCH_FREE = {"__init__", "__main__", "problem", "plan", "selection", "jit"}


def modules() -> Iterator[Path]:
    return iter(sorted(PACKAGE.rglob("*.py")))


def unit_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first[: -len(".py")] if first.endswith(".py") else first


def imports(path: Path) -> Iterator[Tuple[str, ast.stmt]]:
    """(dotted name, statement) of everything that ``path`` imports, at any depth; relative names made absolute."""
    package = ("extend_attn", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            if module == "extend_attn" or node.module is None:  # from . import name: a module or a public name
                for alias in node.names:
                    yield f"{module}.{alias.name}", node
            else:
                yield module, node


def imported_units(path: Path) -> Set[str]:
    """Units of the package that ``path`` imports; a public name counts as the unit that holds it."""
    import extend_attn

    units = set()
    for name, _ in imports(path):
        parts = name.split(".")
        if parts[0] == "extend_attn" and len(parts) > 1 and parts[1] != "__version__":
            units.add(extend_attn._HOME.get(parts[1], parts[1]).split(".")[0])
    return units - {unit_of(path)}


def test_every_module_has_its_place():
    assert {unit_of(path) for path in modules()} <= set(ARROWS)


@pytest.mark.parametrize("unit", sorted(ARROWS))
def test_arrows(unit):
    files = [path for path in modules() if unit_of(path) == unit]
    assert files, f"{unit} is listed but not there"
    for path in files:
        wrong = imported_units(path) - ARROWS[unit]
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_arrows_have_no_cycle():
    done: Set[str] = set()
    while len(done) < len(ARROWS):
        ready = {unit for unit, targets in ARROWS.items() if unit not in done and targets <= done}
        assert ready, f"a cycle among {', '.join(sorted(set(ARROWS) - done))}"
        done |= ready


@pytest.mark.parametrize("unit", sorted(TORCH_FREE))
def test_torch_free(unit):
    """No import of torch or triton on loading; ``selection`` asks torch for the GPU inside a function."""
    for path in (p for p in modules() if unit_of(p) == unit):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name.split(".")[0] for n in top if isinstance(n, ast.Import) for alias in n.names}
        names |= {(n.module or "").split(".")[0] for n in top if isinstance(n, ast.ImportFrom) and not n.level}
        assert not names & {"torch", "triton"}, path.relative_to(ROOT)
        if unit != "selection":
            anywhere = {name.split(".")[0] for name, _ in imports(path)}
            assert not anywhere & {"torch", "triton"}, path.relative_to(ROOT)


def test_the_import_reader_sees_what_it_should():
    """The tests above would pass on anything if the reader missed imports."""
    names = {name for name, _ in imports(PACKAGE / "attention.py")}
    assert {"torch", "extend_attn.plan.select", "extend_attn.problem", "extend_attn.inputs"} <= names


SOURCES = [*modules(), *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "bench").rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_size(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines; a file has one subject and at most {MAX_LINES}"


def test_linter():
    """The whole tree, by the configuration in pyproject.toml."""
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_python_39_syntax():
    for path in modules():
        ast.parse(path.read_text(encoding="utf-8"), filename=str(path), feature_version=(3, 9))


@pytest.mark.parametrize("path", list(modules()), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_docstring(path):
    text = path.read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "a module says what its subject is"


def test_readme_sets_everything_up_with_two_commands():
    """One command runs the demo, one the tests; both come with the clone."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Install", 1)[1].split("\n## ", 1)[0]
    block = re.search(r"```(?:bash|sh)?\n(.*?)```", section, re.S)
    commands = [line.split("#")[0].strip() for line in block.group(1).splitlines() if line.strip()]
    assert commands == ["./dev demo", "./dev test"]


def test_readme_example_runs():
    """The README's complete example, as it stands, on whatever this machine has."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    exec(compile(example, "README.md", "exec"), {})


def test_documents_link_to_files_that_exist():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
