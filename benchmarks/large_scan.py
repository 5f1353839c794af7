"""`plan` and a second run over as many files as ImageNet has: `python -m benchmarks.large_scan [files]`, with time and memory.

The files are empty and lie in 1,000 folders below a temporary folder, which is removed at the end; they need about as many
inodes, and no space. Whole processes, warm cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FILES, FOLDERS = 1_331_167, 1_000  # ImageNet's training and validation images
LIMIT = 2.0
RECIPE = """
title: many files
steps:
  images: {stage: index, config: {source: {kind: folder}, check: names}, paths: {images: %s}}
"""
RUN, PLAN = ("run", "--quiet"), ("plan",)


def main(files: int = FILES) -> None:
    """Print the table: one process each, since listing takes long."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        make_files(root / "images", files)
        (root / "recipe.yaml").write_text(RECIPE % (root / "images"))
        rows = [
            ("first `run`, which lists and indexes", *measure(root, *RUN), None),
            ("second `run`", *measure(root, *RUN), LIMIT),
            ("`plan`", *measure(root, *PLAN), LIMIT),
            ("`plan --rescan`, which lists", *measure(root, *PLAN, "--rescan"), None),
        ]
    print(f"{files:,} empty files in {FOLDERS:,} folders:\n")
    print("| command | seconds | limit | peak memory, MB |")
    print("|---|---|---|---|")
    for name, seconds, megabytes, limit in rows:
        bar = "" if limit is None else f"< {limit:.0f}: {'holds' if seconds < limit else 'missed'}"
        print(f"| {name} | {seconds:.1f} | {bar} | {megabytes:.0f} |")


def make_files(root: Path, files: int) -> None:
    for number in range(FOLDERS):
        folder = root / f"n{number:08d}"
        folder.mkdir(parents=True)
        for image in range(number, files, FOLDERS):
            os.close(os.open(folder / f"{image:08d}.JPEG", os.O_CREAT | os.O_WRONLY))


def measure(root: Path, *command: str) -> tuple[float, float]:
    """Seconds and peak memory (MB) of one command of ours."""
    smalti = str(Path(sys.executable).with_name("smalti"))
    line = [smalti, command[0], str(root / "recipe.yaml"), "--store", str(root / "store"), *command[1:]]
    started = time.perf_counter()
    process = subprocess.Popen([*line, "--json"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(status, line)
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
