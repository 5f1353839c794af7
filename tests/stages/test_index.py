"""index: the list of the images, its facts, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import InputError, UsageError
from pipeline.images import ImageSet
from pipeline.store import Store
from tests.stages.conformance import check_every_crash, check_same_bytes, draw_folder, index_folder, run_stage

FOLDER = {"source": {"kind": "folder"}}
SKIP = {"source": {"kind": "folder"}, "decode": {"corrupt": "skip", "max_skipped": 1}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "images", images=3)


def test_lists_a_folder(folder: Path, tmp_path: Path) -> None:
    artifact = index_folder(folder, tmp_path / "store")
    image_set = ImageSet.open(artifact.path)
    assert image_set.keys[:2] == ["class-0/000.png", "class-0/001.png"]
    assert image_set.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert artifact.facts == {
        "images": 6,
        "classes": 2,
        "class_names": ["class-0", "class-1"],
        "source": "folder",
        "split": "",
    }
    assert artifact.figure == "6 images, 2 classes"


def test_digits_need_no_folder(tmp_path: Path) -> None:
    artifact = run_stage("index", tmp_path, {"source": {"kind": "digits", "split": "held-out"}})
    assert artifact.figure == "360 images, 10 classes"
    assert ImageSet.open(artifact.path).image(0).shape == (32, 32, 3)


def test_the_place_of_the_folder_is_not_in_the_key_and_is_found_again(folder: Path, tmp_path: Path) -> None:
    first = index_folder(folder, tmp_path / "store")
    moved = folder.rename(tmp_path / "moved")
    again = index_folder(moved, tmp_path / "store")
    assert again.key == first.key
    assert ImageSet.open(again.path).image(0).shape == (16, 16, 3)


def test_another_size_is_another_key(folder: Path, tmp_path: Path) -> None:
    first = index_folder(folder, tmp_path / "store")
    with (folder / "class-1" / "000.png").open("ab") as file:
        file.write(b"\0")
    assert index_folder(folder, tmp_path / "store").key != first.key


def test_skips_what_cannot_be_decoded_and_lists_it(folder: Path, tmp_path: Path) -> None:
    (folder / "class-0" / "001.png").write_bytes(b"no image")
    artifact = run_stage("index", tmp_path / "store", SKIP, paths={"images": folder})
    assert artifact.facts["images"] == 5
    assert "class-0/001.png" in artifact.file("skipped.jsonl").read_text()


def test_skips_no_more_than_allowed(folder: Path, tmp_path: Path) -> None:
    for name in ("000.png", "001.png"):
        (folder / "class-0" / name).write_bytes(b"")
    with pytest.raises(InputError, match="2 of 6 images cannot be decoded"):
        run_stage("index", tmp_path / "store", SKIP, paths={"images": folder})


def test_every_crash(folder: Path, tmp_path: Path) -> None:
    (folder / "class-0" / "001.png").write_bytes(b"no image")

    assert check_every_crash(lambda store: run_stage("index", store, SKIP, paths={"images": folder}), tmp_path) > 10


def test_refuses_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "images" / "cats").mkdir(parents=True)
    with pytest.raises(InputError, match="cats has no images"):
        index_folder(tmp_path / "images", tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_refuses_a_missing_folder_and_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="but there is nothing"):
        index_folder(tmp_path / "nowhere", tmp_path / "store")
    with pytest.raises(InputError, match="none is given"):
        run_stage("index", tmp_path / "store", FOLDER)


def test_refuses_a_folder_for_digits(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="its source is digits"):
        run_stage("index", tmp_path / "store", paths={"images": folder})


def test_refuses_unknown_settings(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'max_skipped'"):
        run_stage("index", tmp_path, {"decode": {"max_skiped": 1}})


def test_force_makes_the_same_again(folder: Path, tmp_path: Path) -> None:
    first = index_folder(folder, tmp_path / "one")
    again = run_stage("index", tmp_path / "one", FOLDER, paths={"images": folder}, force=True)
    check_same_bytes(index_folder(folder, tmp_path / "two"), again)
    assert len(Store(tmp_path / "one").artifacts()) == 1
    assert again.key == first.key
