"""Image folders: as many empty files in 1,000 folders as ImageNet has, listed, indexed, and asked again for their times."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.large import Measured, Row
from pipeline.recipe import Recipe, load_recipe
from pipeline.runner import Options, plan, run
from pipeline.store import Store
from pipeline.trees import Memory
from stages import stages

FILES, FOLDERS = 1_331_167, 1_000  # ImageNet's training and validation images
RECIPE = """
title: many files
steps:
  images: {stage: index, config: {source: {kind: folder}, check: names}, paths: {images: images}}
"""


def measure(scale: float, folder: Path) -> Iterator[Row]:
    """Each command asks anew, as a process of its own would; the cache of the file system is warm."""
    files = round(scale * FILES)
    make_files(folder / "images", files)
    recipe, store = load(folder), Store(folder / "store")
    commands: list[tuple[str, Callable[[Memory], Any]]] = [
        ("first run, which lists and indexes", partial(run_all, recipe, store)),
        ("second run", partial(run_all, recipe, store)),
        ("plan", lambda memory: plan(recipe, store, memory)),
        ("plan --rescan, which lists", lambda memory: plan(recipe, store, memory)),
    ]
    for what, command in commands:
        with Measured() as measured:
            command(Memory(store.root, rescan="--rescan" in what))
        times = 1 / scale if "lists" in what else 1.0  # the others ask the folders alone
        yield measured.row(what, f"{files:,} files in {FOLDERS:,} folders", times=times)


def make_files(root: Path, files: int) -> None:
    for number in range(FOLDERS):
        folder = root / f"n{number:08d}"
        folder.mkdir(parents=True)
        for image in range(number, files, FOLDERS):
            os.close(os.open(folder / f"{image:08d}.JPEG", os.O_CREAT | os.O_WRONLY))


def load(folder: Path) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.replace("{images: images}", f"{{images: {folder / 'images'}}}"))
    return load_recipe(file, stages())


def run_all(recipe: Recipe, store: Store, memory: Memory) -> None:
    for _ in run(recipe, store, Options(memory=memory)):
        pass
