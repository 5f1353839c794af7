"""docs/extending.md does what it says: in a copy of the project its files are written, its changes made, its commands run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
TEST_OF_THE_GENERATOR = """
import torch
from conformance import GeneratorConformance
from models.generators.config import BigramConfig, CodeShape
from models.generators.generator import build_generator


class TestBigram(GeneratorConformance):
    def build(self):
        return build_generator(BigramConfig(width=16), CodeShape(codes=12, grid=(2, 3), classes=3))

    def uncached(self, model, codes_BT, labels_B):
        return model(codes_BT[:, :-1], labels_B)
"""
TEST_OF_THE_QUANTIZER = """
from models.quantizers.config import FiniteScalarConfig
from models.quantizers.finite_scalar import FiniteScalarQuantizer
from quantizer_suite import QuantizerSuite


class TestFiniteScalar(QuantizerSuite):
    dim = 3

    def build(self):
        return FiniteScalarQuantizer(FiniteScalarConfig(levels=(8, 6, 5)), dim=3)
"""
PACKAGES = ("smalti", "pipeline", "models", "stages", "cli")


def blocks(head: str) -> list[tuple[str, str]]:
    """(rest of the opening line, text) of the fenced blocks that begin with `head`."""
    return re.findall(rf"^```{head}([^\n]*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def hunks() -> list[tuple[str, str, str]]:
    """(file, lines to be replaced, lines to stand there) of every hunk of the page's diffs."""
    found = []
    for _, text in blocks("diff"):
        file = re.search(r"^\+\+\+ b/(.*)$", text, re.MULTILINE).group(1)
        for hunk in re.split(r"^@@.*\n", text, flags=re.MULTILINE)[1:]:
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line.startswith("-"))
            found.append((file, old, "".join(line[1:] for line in lines if line.startswith("+"))))
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("copy")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    for head, text in blocks("python"):
        (root / head.strip().removeprefix("file=")).write_text(text)
    for file, old, new in hunks():
        text = (root / file).read_text()
        assert text.count(old) == 1, f"{file} does not hold once:\n{old}"
        (root / file).write_text(text.replace(old, new))
    return root


def test_each_example_is_short() -> None:
    parts = PAGE.split("\n## ")[1:]
    parts = [part for part in parts if "\n```python file=" in part]
    assert len(parts) == 3
    for part in parts:
        code = re.findall(r"^```(?:python|diff)[^\n]*\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
        assert 0 < sum(text.count("\n") for text in code) < 100


def test_the_generator_is_sixty_lines() -> None:
    [text] = [text for head, text in blocks("python") if head.endswith("/bigram.py")]
    assert text.partition("from __future__")[2].count("\n") <= 60


@pytest.mark.parametrize(
    ("suite", "test"),
    [
        ("generators/conformance.py", TEST_OF_THE_GENERATOR),
        ("quantizers/quantizer_suite.py", TEST_OF_THE_QUANTIZER),
    ],
)
def test_the_example_passes_the_conformance_suite(copy: Path, tmp_path: Path, suite: str, test: str) -> None:
    shutil.copy(ROOT / "tests" / "models" / suite, tmp_path)
    (tmp_path / "test_example.py").write_text(test)
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_commands_of_the_page_run(copy: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(copy), "SMALTI_STORE": str(copy / "store"), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-c", "from cli.main import main; main()"]
    lines = [line for head, text in blocks("sh") if "in=copy" in head for line in text.splitlines() if line]
    assert len(lines) == 11
    for line in lines:
        words = line.split()
        assert words[0] == "smalti"
        done = subprocess.run([*start, *words[1:]], cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    picture = list((copy / "store" / "map-entropy").glob("*/entropy.png"))
    assert len(picture) == 1
