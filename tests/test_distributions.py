"""Two distributions: the reader in a stranger's project, which has packages named like ours, and the pipeline."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

import numpy as np
import pytest

import smalti

CLONE = Path(__file__).parents[1]
OURS = ("cli", "models", "pipeline", "stages")
PROGRAM = """
import sys
import numpy as np
import smalti

codes = np.arange(12 * 2 * 4).reshape(12, 2, 4)
made = smalti.create_tokens("set", codes, labels=[0] * 12, codes=96, grid=(2, 2), name="outside")
found = smalti.verify_tokens("set")
assert (np.asarray(found.tokens) == codes).all()
assert sum(len(rows) for rows, _, _ in found.epoch(8, seed=0, epoch=0)) == 24
ours = {"models", "pipeline", "stages", "cli", "torch", "pydantic", "dask", "typer", "safetensors"} & set(sys.modules)
assert not ours, ours
import models, pipeline
assert models.MINE and pipeline.MINE
"""
OPENS_MAPPED = """
import sys, smalti
next(smalti.open_tokens("given").epoch(8, seed=0, epoch=0))
assert "zarr" not in sys.modules  # it takes long to import; reading mapped sets does without it
"""
DISTRIBUTION_OF = {
    "PIL": "pillow",
    "distributed": "dask",
    "faiss": "faiss-cpu",
    "google_crc32c": "google-crc32c",
    "huggingface_hub": "huggingface-hub",
    "pydantic_core": "pydantic",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "torch_fidelity": "torch-fidelity",
    "ruamel": "ruamel.yaml",
}
"""Import name -> distribution, where they differ."""


@dataclass(frozen=True)
class Wheel:
    """A built wheel: its file, the names in it, its metadata and what it installs as commands."""

    path: Path

    @property
    def names(self) -> list[str]:
        return zipfile.ZipFile(self.path).namelist()

    @property
    def packages(self) -> set[str]:
        return {name.partition("/")[0] for name in self.names if ".dist-info/" not in name}

    def text(self, name: str) -> str:
        return zipfile.ZipFile(self.path).read(next(one for one in self.names if one.endswith(name))).decode()

    @property
    def needs(self) -> set[str]:
        """Names of required distributions, without those of extras."""
        found = HeaderParser().parsestr(self.text("METADATA")).get_all("Requires-Dist") or []
        return names_of(line for line in found if "extra ==" not in line)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Wheel]:
    """Both wheels, built from a copy of the clone without network."""
    folder = tmp_path_factory.mktemp("wheels")
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    for name in ("smalti", *OURS):
        shutil.copytree(CLONE / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CLONE / name, folder)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder / "made")]
    pip(*build, "./smalti", ".", folder=folder)
    return {path.name.partition("-")[0]: Wheel(path) for path in (folder / "made").iterdir()}


def pip(*words: str, folder: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "pip", *words], cwd=folder, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def names_of(requirements: Iterable[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9._-]", line)[0].lower() for line in requirements}


def test_the_reader_is_one_package_without_commands(wheels: dict[str, Wheel]) -> None:
    reader = wheels["smalti"]
    assert reader.packages == {"smalti"}
    assert reader.needs == {"numpy", "zarr", "google-crc32c"}
    sources = {f"smalti/{path.name}" for path in (CLONE / "smalti").glob("*.py")}
    assert {name for name in reader.names if ".dist-info/" not in name} == {
        *sources,
        "smalti/py.typed",
        "smalti/FORMAT.md",
    }
    assert not [name for name in reader.names if name.endswith("entry_points.txt")]
    assert reader.text("LICENSE") == (CLONE / "LICENSE").read_text()


def test_the_pipeline_needs_the_reader_and_has_the_command(wheels: dict[str, Wheel]) -> None:
    pipeline = wheels["smalti_pipeline"]
    assert pipeline.packages == set(OURS)
    assert "smalti" in pipeline.needs
    assert "smalti = cli.main:main" in pipeline.text("entry_points.txt")
    assert {name for name in pipeline.names if name.endswith(".py")} == {
        path.relative_to(CLONE).as_posix() for path in files_of(*OURS)
    }


def test_both_have_one_version(wheels: dict[str, Wheel]) -> None:
    for wheel in wheels.values():
        assert wheel.path.name.split("-")[1] == smalti.__version__
    assert f"smalti=={smalti.__version__}" in project()["dependencies"]
    assert f"\nversion: {smalti.__version__}\n" in (CLONE / "CITATION.cff").read_text()


@pytest.fixture
def project_of_a_stranger(tmp_path: Path) -> Path:
    """A folder with packages named like ours, and a small token set."""
    for name in OURS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = True\n")
    codes_ICT = np.arange(12 * 2 * 4).reshape(12, 2, 4)
    smalti.create_tokens(tmp_path / "given", codes_ICT, labels=[0] * 12, codes=96, grid=(2, 2), name="given")
    return tmp_path


def run_program(folder: Path, program: str, python: str = sys.executable) -> None:
    (folder / "program.py").write_text(program)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "program.py"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", [PROGRAM, OPENS_MAPPED])
def test_a_project_with_our_names(program: str, wheels: dict[str, Wheel], project_of_a_stranger: Path) -> None:
    zipfile.ZipFile(wheels["smalti"].path).extractall(project_of_a_stranger)
    run_program(
        project_of_a_stranger, f"import smalti\nassert __file__.rpartition('/')[0] in smalti.__file__\n{program}"
    )


def test_the_reader_in_a_fresh_environment(
    wheels: dict[str, Wheel], project_of_a_stranger: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Installed from the registry's packages alone; skipped where the registry is out of reach."""
    folder = tmp_path_factory.mktemp("fresh")
    once = ["--retries", "0", "--timeout", "5"]
    if pip("download", "-q", "--no-deps", *once, "-d", "probe", "google-crc32c", folder=folder, check=False).returncode:
        pytest.skip("the package registry is out of reach")
    venv.create(folder / "env", with_pip=False)
    python = str(folder / "env" / "bin" / "python")
    pip("--python", python, "install", "--quiet", str(wheels["smalti"].path), folder=folder)
    for program in (PROGRAM, OPENS_MAPPED):
        run_program(project_of_a_stranger, program, python)
    assert not (folder / "env" / "bin" / "smalti").exists()


def project(folder: str = ".") -> dict[str, list[str]]:
    found: dict[str, list[str]] = tomllib.loads((CLONE / folder / "pyproject.toml").read_text())["project"]
    return found


def files_of(*folders: str) -> list[Path]:
    """Source files of our packages, without what builds leave there."""
    return [path for name in folders for path in (CLONE / name).rglob("*.py") if "build" not in path.parts]


def imported(folders: Sequence[str]) -> set[str]:
    """Distributions of the modules that the files in these folders import, wherever in them."""
    nodes = [node for path in files_of(*folders) for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    local = {"tests", "benchmarks", *OURS, *(path.stem for path in files_of("tests"))}
    outside = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - local
    return {DISTRIBUTION_OF.get(name, name) for name in outside}


def test_what_is_imported_is_declared_and_the_reverse() -> None:
    extras = project()["optional-dependencies"]
    reader = names_of(project("smalti")["dependencies"])
    needed, metrics = names_of(project()["dependencies"]), names_of(extras["metrics"])
    assert imported(["smalti"]) - {"smalti"} == reader
    assert imported(OURS) == {*needed, *metrics} - {"faiss-gpu", "lpips"}  # files of lpips are read, it is not imported
    assert imported(["tests", "benchmarks"]) <= {*reader, *needed, *metrics, *names_of(extras["dev"])}
