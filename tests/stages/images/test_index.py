"""index: the list of the images, its facts, and refusals."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.artifact import Artifact
from pipeline.errors import BadImages, InputError, UsageError
from pipeline.images import ImageSet, UnreadableImage
from pipeline.progress import Progress
from pipeline.recipe import load_recipe
from pipeline.runner import Options, run
from pipeline.stage import imply
from pipeline.store import Store
from tests.stages.conformance import (
    check_every_crash,
    check_same_bytes,
    draw_folder,
    find_stage,
    index_folder,
    run_stage,
)

FOLDER = {"source": {"kind": "folder"}}
RECIPE = """
title: features of two splits
paths: {images: null}
steps:
  train-images: {stage: index, config: {source: {split: train}}, paths: {images: "{images}"}}
  val-images: {stage: index, config: {source: {split: val}}, paths: {images: "{images}"}}
  train: {stage: extract, inputs: {images: train-images}, config: {encoder: {kind: whitened-patches, image_size: 16, cells: 2, patch: 8, dims: 5}}}
  val: {stage: extract, inputs: {images: val-images}, config: {encoder: {kind: whitened-patches, image_size: 16, cells: 2, patch: 8, dims: 5}}}
"""
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


def test_skip_alone_leaves_out_what_cannot_be_used_and_lists_it(folder: Path, tmp_path: Path) -> None:
    cut = folder / "class-0" / "001.png"
    cut.write_bytes(cut.read_bytes()[:-20])
    (folder / "class-1" / "000.png").write_bytes(b"")
    (folder / "class-1" / "gone.png").symlink_to("nowhere.png")
    skip = {"source": {"kind": "folder"}, "decode": {"corrupt": "skip"}}
    artifact = run_stage("index", tmp_path / "store", skip, paths={"images": folder})
    assert (artifact.facts["images"], artifact.figure) == (4, "4 images, 2 classes, 3 skipped")
    skipped = [json.loads(line) for line in artifact.file("skipped.jsonl").read_text().splitlines()]
    assert skipped == [
        {"key": "class-0/001.png", "reason": "is truncated or damaged"},
        {"key": "class-1/000.png", "reason": "is empty"},
        {"key": "class-1/gone.png", "reason": "is a link to nothing"},
    ]


def test_skips_no_more_than_allowed(folder: Path, tmp_path: Path) -> None:
    for name in ("000.png", "001.png"):
        (folder / "class-0" / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"2 of 6 images .*, 1 may be skipped: .*decode.max_skipped=2"):
        run_stage("index", tmp_path / "store", SKIP, paths={"images": folder})


def test_what_cannot_be_read_is_not_skipped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path) -> bytes:
        raise UnreadableImage("cannot be read: Permission denied", path=path)

    monkeypatch.setattr("pipeline.images.imageset.read_file", deny)
    with pytest.raises(InputError, match="6 of them cannot be read here, which is not skipped") as caught:
        run_stage("index", tmp_path / "store", SKIP | {"decode": {"corrupt": "skip"}}, paths={"images": folder})
    assert "decode." not in str(caught.value.hint)


def test_all_bad_images_are_named_in_one_pass_and_the_list_excludes_them(folder: Path, tmp_path: Path) -> None:
    (folder / "class-0" / "002.png").write_text("a text")
    (folder / "class-1" / "000.png").write_bytes(b"")
    (folder / "class-1" / "loop").symlink_to("..")
    store = tmp_path / "store"
    with pytest.raises(BadImages) as caught:
        index_folder(folder, store)
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith(
        f"3 of 7 images below {folder} cannot be used: class-0/002.png is none of JPEG, PNG, GIF, BMP, WEBP, TIFF, PPM; "
        "class-1/000.png is empty; class-1/loop is a link to a folder that it lies in; "
    )
    assert f"smalti index --images {folder} --set decode.corrupt=skip, or --exclude {store}" in str(caught.value)
    listed = Path(str(caught.value.path)).rename(tmp_path / "bad.txt")
    said = io.StringIO()
    artifact = run_stage("index", store, FOLDER, paths={"images": folder, "exclude": listed}, progress=Progress(said))
    assert "excluded: 2 of 6 images" in said.getvalue()
    assert ImageSet.open(artifact.path).keys == [
        "class-0/000.png",
        "class-0/001.png",
        "class-1/001.png",
        "class-1/002.png",
    ]
    (folder / "class-1" / "001.png").write_bytes(b"")  # the next list has the former one in it
    with pytest.raises(BadImages) as caught:
        run_stage("index", store, FOLDER, paths={"images": folder, "exclude": listed})
    text = Path(str(caught.value.path)).read_text()
    assert all(key in text for key in ("class-1/001.png", "class-0/002.png", "class-1/loop"))


def test_what_the_config_names_is_left_out_where_it_is(folder: Path, tmp_path: Path) -> None:
    def index(name: str, *without: str) -> Artifact:
        config = {**FOLDER, "without": list(without)}
        return run_stage("index", tmp_path / name, config, paths={"images": folder})

    whole = index("whole")
    first = whole.file("keys.txt").read_text().splitlines()[0]
    artifact = index("some", first, "gone/nowhere.jpg")
    assert artifact.file("keys.txt").read_text().splitlines() == whole.file("keys.txt").read_text().splitlines()[1:]
    assert artifact.key != whole.key
    with pytest.raises(InputError, match="excludes all"):
        index("none", *whole.file("keys.txt").read_text().splitlines())
    with pytest.raises(UsageError, match="digits has none"):
        run_stage("index", tmp_path / "digits", {"without": ["a"]})


def test_checks_what_it_is_asked_to_check(folder: Path, tmp_path: Path) -> None:
    for file in folder.rglob("*.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    cut = folder / "class-0" / "001.png"
    cut.write_bytes(cut.read_bytes()[:-20])
    (folder / "class-1" / "002.png").write_bytes(b"")
    found = {}
    for check in ("headers", "pixels"):
        with pytest.raises(BadImages) as caught:
            run_stage("index", tmp_path / "store", FOLDER | {"check": check}, paths={"images": folder})
        found[check] = [key for key in ("class-0/001.png", "class-1/002.png") if key in str(caught.value)]
    assert found == {"headers": ["class-1/002.png"], "pixels": ["class-0/001.png", "class-1/002.png"]}
    names = run_stage("index", tmp_path / "store", FOLDER | {"check": "names"}, paths={"images": folder})
    assert names.facts["images"] == 6


def test_says_what_it_leaves_out(folder: Path, tmp_path: Path) -> None:
    (folder / "stray.png").touch()
    (folder / "notes.txt").touch()
    said = io.StringIO()
    artifact = run_stage("index", tmp_path, FOLDER, paths={"images": folder}, progress=Progress(said))
    sentence = "left out: files that are not images: 1 (notes.txt); images beside the class folders: 1 (stray.png)"
    assert sentence in said.getvalue()
    assert (artifact.path / "log" / "left-out.txt").read_text().splitlines() == [
        "notes.txt\tfiles that are not images",
        "stray.png\timages beside the class folders",
    ]


def test_a_folder_given_alone_means_a_folder(folder: Path) -> None:
    index = find_stage("index")
    assert imply(index, {}, ["images"]) == FOLDER
    assert imply(index, {"source": {"split": "train"}}, ["images"]) == {"source": {"kind": "folder", "split": "train"}}
    assert imply(index, {"source": {"kind": "digits"}}, ["images"]) == {"source": {"kind": "digits"}}
    assert imply(index, {}, []) == {}


def test_a_recipe_names_the_step_that_leaves_a_bad_image_out(tmp_path: Path) -> None:
    """Found by a later step, in the set of one of two index steps: the setting named is the one that helps."""
    folder = draw_folder(tmp_path / "images" / "train", pixels=64).parent
    draw_folder(folder / "val", pixels=64)
    cut = folder / "val" / "class-1" / "003.png"
    cut.write_bytes(cut.read_bytes()[:-20])
    file = tmp_path / "features.yaml"
    file.write_text(RECIPE)

    def run_with(*settings: str) -> list[str]:
        recipe = load_recipe(file, {name: find_stage(name) for name in ("index", "extract")}, settings=settings,
                             paths={"images": str(folder)})  # fmt: skip
        return [step.name for step, _ in run(recipe, Store(tmp_path / "store"), Options())]

    with pytest.raises(BadImages, match=r"class-1/003.png is truncated or damaged") as caught:
        run_with()
    setting = "val-images.decode.corrupt=skip"
    assert str(caught.value).endswith(f": --set {setting}")
    assert run_with(setting) == ["train-images", "val-images", "train", "val"]


def test_every_crash(folder: Path, tmp_path: Path) -> None:
    (folder / "class-0" / "001.png").write_bytes(b"no image")

    assert check_every_crash(lambda store: run_stage("index", store, SKIP, paths={"images": folder}), tmp_path) > 10


def test_refuses_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "images" / "cats").mkdir(parents=True)
    with pytest.raises(InputError, match="images has no images"):
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
