"""The arrows go one way: cli -> stages -> {models, pipeline}, pipeline -> smalti; planning imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
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
OUTSIDE = {"smalti": {"numpy", "zarr", "google_crc32c"}}
NO_FILES = {"pathlib", "os", "shutil", "tempfile", "urllib", "requests", "huggingface_hub"}
FILES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


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


def test_no_relative_or_cyclic_package_imports() -> None:
    for path in FILES:
        relative = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level
        ]
        assert not relative, path
