"""The arrows go one way: cli -> stages -> {models, pipeline}, pipeline -> smalti, and so do those between the groups of stages.

No modules import each other in a circle, and planning imports no torch.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "smalti": set(),
    "pipeline": {"smalti"},
    "models": set(),
    "stages": {"models", "pipeline", "smalti"},
    "cli": {"stages", "pipeline", "smalti"},
}
GROUPS = (("devices",), ("images", "weights"), ("codes",), ("training", "sampling", "scoring"))
"""Groups of stages, layer by layer: each imports itself and what stands in the layers before its own."""
OUTSIDE = {"smalti": {"numpy", "zarr", "google_crc32c"}}
NO_FILES = {"pathlib", "os", "shutil", "tempfile", "urllib", "requests", "huggingface_hub"}
FILES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def modules_of(tree: ast.AST) -> Iterator[str]:
    """Our modules that a file imports, also inside functions and for annotations alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from {name if name in MODULES else str(node.module) for name in names} & set(MODULES)
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & set(MODULES)
        yield from modules_of(node)


def test_no_circles() -> None:
    graph = {name: set(modules_of(ast.parse(path.read_text()))) - {name} for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # CycleError names a circle


@pytest.mark.parametrize("name", [name for name in MODULES if name.count(".") and name.startswith("stages.")])
def test_groups_of_stages(name: str) -> None:
    group = name.split(".")[1]
    place = next(number for number, layer in enumerate(GROUPS) if group in layer)
    below = {group}.union(*GROUPS[:place])
    found = {
        other.split(".")[1] for other in modules_of(ast.parse(MODULES[name].read_text())) if other.startswith("stages.")
    }
    assert found <= below


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_arrows(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert imported(path) & set(ALLOWED) - {package} <= ALLOWED[package]


@pytest.mark.parametrize("path", sorted((ROOT / "smalti").glob("*.py")), ids=lambda path: path.name)
def test_public_library_needs_numpy_and_zarr_alone(path: Path) -> None:
    assert imported(path) - set(sys.stdlib_module_names) - {"smalti"} <= OUTSIDE["smalti"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "models").rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_models_know_no_files(path: Path) -> None:
    assert not imported(path) & NO_FILES
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in ("open", "print")]


@pytest.mark.parametrize("package", ["smalti", "pipeline"])
def test_no_torch_in_files_of(package: str) -> None:
    assert not [path for path in (ROOT / package).rglob("*.py") if "torch" in imported(path)]


def test_planning_imports_no_torch() -> None:
    code = "import sys, cli.main, pipeline.runner, smalti; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_relative_imports() -> None:
    for path in FILES:
        relative = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level
        ]
        assert not relative, path
