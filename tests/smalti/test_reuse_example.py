"""The example of an outside project runs as its README says, on the golden token set."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_example(folder: Path, token_set: Path) -> subprocess.CompletedProcess[str]:
    shutil.copytree(ROOT / "examples" / "reuse_tokens", folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "smalti").symlink_to(ROOT / "smalti")  # the installed package
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "count_codes.py", str(token_set)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_example_runs(tmp_path):
    done = run_example(tmp_path / "project", ROOT / "tests" / "golden" / "tokens")
    assert done.returncode == 0, done.stderr
    alone, after = map(float, re.findall(r"([\d.]+) (?:alone|after)", done.stdout))
    assert after < alone < 8.3  # log2(300) = 8.2: in the golden set each code follows the one before


def test_example_says_what_is_wrong(tmp_path):
    done = run_example(tmp_path / "project", tmp_path)
    assert done.returncode == 1
    assert "zarr.json is missing" in done.stderr
    assert "Traceback" not in done.stderr
