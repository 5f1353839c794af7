"""The documentation runs: every command of README and docs, in a folder like a fresh clone with a finished (tiny) store.

A block after `<!-- not run: reason -->` needs a GPU, ImageNet, a network or minutes: its commands are parsed with
--dry-run (or --help where a command has none), its make lines with -n.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import OPTIONS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]*) -->\n)?```(?P<head>sh|python)(?P<rest>[^\n]*)\n(?P<text>.*?)^```$",
    re.M | re.S,
)
FOLDERS = "smalti|pipeline|models|stages|cli|tests|docs|recipes|examples|benchmarks"
ELSEWHERE = ("in=copy", "file=")  # run by test_extending


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a clone has, and a store in which the tiny digits recipe has run."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("recipes", "examples", "benchmarks", "smalti", "Makefile", "pyproject.toml", "constraints.txt"):
        (root / name).symlink_to(ROOT / name)
    run(["smalti", "run", "recipes/digits/rar.yaml", "--quiet", *OPTIONS], root)
    return root


def environment(root: Path) -> dict[str, str]:
    """The user's shell in that folder: `smalti` and `python` are those that run the tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "SMALTI_STORE": str(root / "store"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def run(command: list[str] | str, root: Path) -> str:
    """Run a command (text goes through the shell) and return what it prints."""
    done = subprocess.run(
        command, cwd=root, env=environment(root), shell=isinstance(command, str), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def write_recipes(page: Path, root: Path) -> None:
    """Recipes of the page, where its commands find them."""
    for name, text in re.findall(r"^```yaml file=(\S+)\n(.*?)^```$", page.read_text(), re.M | re.S):
        (root / name).write_text(text)


def blocks(page: Path) -> list[re.Match[str]]:
    return [found for found in BLOCK.finditer(page.read_text()) if not any(word in found["rest"] for word in ELSEWHERE)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page: Path, clone: Path) -> None:
    write_recipes(page, clone)
    for block in blocks(page):
        if block["head"] == "python":
            assert block["reason"] is None, "python blocks are always run"
            run([sys.executable, "-c", block["text"]], clone)
            continue
        for line in block["text"].replace("\\\n", " ").splitlines():
            if line and not line.startswith("#"):
                run(line, clone) if block["reason"] is None else parse(line, clone)


def parse(line: str, root: Path) -> None:
    """Check a command that is not run: options are known, recipes and targets exist."""
    words = [word for word in shlex.split(line, comments=True) if "=" not in word or not word.split("=")[0].isupper()]
    if words[0] == "make":
        run(["make", "-n", *shlex.split(line, comments=True)[1:]], root)
    elif words[0] == "smalti":
        run([*words, "--dry-run"] if words[1] in ("run",) else [*words[:2], "--help"], root)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    """Files and folders of the project, and targets of links; but what a page itself writes."""
    text = page.read_text()
    named = {ROOT / path for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text)}
    linked = {page.parent / path for path in re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", text)}
    written = {ROOT / path for path in re.findall(r"^```.*\bfile=(\S+)$", text, re.M)}
    assert [path for path in sorted((named | linked) - written) if not path.exists()] == []


def test_every_page_has_its_commands_read() -> None:
    assert sum(len(blocks(page)) for page in PAGES) >= 5


def test_make_clean_keeps_the_store() -> None:
    """What took days is deleted by its own target alone."""
    assert "/results" not in run(["make", "-n", "clean", "STORE=/results"], ROOT)
    assert "rm -rf /results" in run(["make", "-n", "clean-store", "STORE=/results"], ROOT)


def test_several_processes_go_through_torchrun() -> None:
    asked = ["make", "-n", "all", "RECIPE=recipes/imagenet256/rar-b.yaml"]
    assert "torchrun --standalone --nproc-per-node 8 --no-python .venv/bin/smalti run" in run(
        [*asked, "PROCESSES=8"], ROOT
    )
    assert "torchrun" not in run(asked, ROOT)
    assert "torchrun" not in run([*asked, "PROCESSES=1"], ROOT)
