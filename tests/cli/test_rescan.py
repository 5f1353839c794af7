"""--rescan, and what stands without it: folders are trusted by their times, files by their sizes when they are read."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import pipeline.images.sources
from cli.main import app
from pipeline.images import ImageSet, UnreadableImage
from pipeline.store import Store
from tests.stages.conformance import draw_folder

HOUR = 3600
RECIPE = """
title: pictures
paths: {images: null}
steps:
  pictures: {stage: index, config: {source: {kind: folder}}, paths: {images: images}}
"""


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were listed, one after the other."""
    found: list[Path] = []
    really = pipeline.images.sources.list_folder

    def listing(source: Any, root: Path) -> Any:
        found.append(root)
        return really(source, root)

    monkeypatch.setattr(pipeline.images.sources, "list_folder", listing)
    return found


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    root = draw_folder(tmp_path / "images", images=2)
    then = time.time() - HOUR
    for folder in (root, *root.iterdir()):
        os.utime(folder, (then, then))
    return root


def smalti(line: str, *, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*line.split(), "--json"])
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def overwrite(file: Path) -> None:
    """Another picture in the same file, so that its folder keeps its time."""
    data = file.with_name("000.png").read_bytes() + b"more"
    with file.open("r+b") as opened:
        opened.truncate()
        opened.write(data)


def test_a_second_run_and_every_plan_list_nothing(images: Path, listings: list[Path]) -> None:
    run, plan = (f"{word} recipe.yaml --images images" for word in ("run", "plan"))
    assert smalti(f"{run} --quiet")["steps"][0]["state"] == "made"
    listings.clear()
    assert smalti(f"{run} --quiet")["steps"][0]["state"] == "done"
    assert smalti(plan)["steps"][0]["state"] == "done"
    assert smalti("index --images images --dry-run")["state"] == "done"
    assert listings == []
    for line in (f"{run} --quiet --rescan", f"{plan} --rescan", "index --images images --dry-run --rescan"):
        smalti(line)
    assert len(listings) == 3
    (images / "class-0" / "new.png").write_bytes((images / "class-0" / "000.png").read_bytes())
    assert smalti(plan)["steps"][0]["state"] == "run"


def test_an_overwritten_file_is_caught_when_it_is_read_and_found_by_a_rescan(images: Path) -> None:
    made = smalti("index --images images --quiet")
    overwrite(images / "class-1" / "001.png")
    assert smalti("index --images images --quiet")["key"] == made["key"]
    with pytest.raises(UnreadableImage, match=r"bytes, but had \d+ when it was indexed") as caught:
        ImageSet.open(Path(made["path"])).image(3)
    assert "--rescan" in str(caught.value.hint)
    again = smalti("index --images images --quiet --rescan")
    assert again["key"] != made["key"]
    assert ImageSet.open(Path(again["path"])).image(3).shape == (16, 16, 3)
    assert smalti("index --images images --quiet") == again | {"reused": True}


def test_nothing_is_made_of_what_is_only_remembered(images: Path) -> None:
    made = smalti("index --images images --quiet")
    overwrite(images / "class-1" / "001.png")
    forced = smalti("index --images images --quiet --force")
    assert forced["key"] != made["key"]
    assert [path.name for path in Store(Path("store")).artifacts()] == sorted([made["key"], forced["key"]])


def test_bad_images_are_looked_at_again(images: Path) -> None:
    """An index that was refused is not made from what was remembered before the image was mended."""
    whole = (images / "class-0" / "000.png").read_bytes()
    with (images / "class-0" / "000.png").open("r+b") as file:
        file.truncate(0)
    Path("store").mkdir()
    assert smalti("index --images images --quiet", code=3)["error"]["code"] == 3
    with (images / "class-0" / "000.png").open("r+b") as file:
        file.write(whole)
    assert not smalti("index --images images --quiet")["reused"]
