"""The library in a stranger's project, which has packages of its own named like ours."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import smalti

CLONE = Path(smalti.__file__).parents[1]
DECOYS = ("models", "pipeline", "stages", "cli")
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


def run_outside(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    (folder / "smalti").symlink_to(CLONE / "smalti")  # what `pip install` leaves: the package, not the clone
    (folder / "program.py").write_text(program)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "program.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_project_with_our_names(tmp_path):
    for name in DECOYS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = True\n")
    done = run_outside(tmp_path, PROGRAM)
    assert done.returncode == 0, done.stderr


def test_opening_needs_numpy_alone(tmp_path, token_set):
    """zarr takes long to import; reading mapped sets does without it."""
    program = f"""
import sys, smalti
next(smalti.open_tokens({str(token_set.path)!r}).epoch(8, seed=0, epoch=0))
assert "zarr" not in sys.modules
"""
    done = run_outside(tmp_path, program)
    assert done.returncode == 0, done.stderr


def test_version_is_that_of_the_package():
    assert tomllib.loads((CLONE / "pyproject.toml").read_text())["project"]["version"] == smalti.__version__
