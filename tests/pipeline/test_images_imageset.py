"""Image sets: written by pure functions, opened again, read at random, and refused when anything has changed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.durable import write_file
from pipeline.errors import BadImages, CorruptError, InputError
from pipeline.images import (
    CorruptImage,
    DecodePolicy,
    DigitsSource,
    FolderSource,
    ImageSet,
    Problem,
    index_files,
    list_images,
)
from pipeline.images.views import CenterViews, ShiftViews

SKIP = DecodePolicy(corrupt="skip", max_skipped=2)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for row in range(6):
        path = tmp_path / "images" / "train" / f"n{row % 2}" / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20 + row, 30, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def index(directory: Path, source: FolderSource | DigitsSource, root: Path | None = None) -> Path:
    files = index_files(list_images(source, root), source=source, decode=DecodePolicy())
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    if root is not None:
        write_file(directory / "log" / "images-root.txt", f"{root}\n".encode())
    return directory


@pytest.fixture
def folder_set(tmp_path: Path, root: Path) -> Path:
    return index(tmp_path / "set", FolderSource(split="train"), root)


def test_folder_round_trip(folder_set: Path, root: Path) -> None:
    images = ImageSet.open(folder_set)
    assert (len(images), images.keys[0], images.classes) == (6, "n0/0.png", ["n0", "n1"])
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.source == FolderSource(split="train")
    for row, key in enumerate(images.keys):
        np.testing.assert_array_equal(images.image(row), np.asarray(Image.open(root / "train" / key)))


def test_files_are_deterministic_and_name_no_path(root: Path) -> None:
    source = FolderSource(split="train", deep=True)
    first, second = (index_files(list_images(source, root), source=source, decode=SKIP) for _ in range(2))
    assert first == second
    assert first.keys() == {"images.json", "keys.txt", "labels.npy", "sizes.npy", "digests.npy", "skipped.jsonl"}
    assert not any(str(root).encode() in data for data in first.values())


def test_digits_round_trip(tmp_path: Path) -> None:
    images = ImageSet.open(index(tmp_path / "set", DigitsSource(split="held-out", size=16)))
    assert len(images) == 360
    assert images.image(5).shape == (16, 16, 3)
    views = ShiftViews(size=16, pixels=1)
    every = images.all_views([7, 3], views=views)
    assert every.shape == (2, 9, 16, 16, 3)
    np.testing.assert_array_equal(images.chosen_views([3, 7], [4, 0], views=views), [every[1, 4], every[0, 0]])
    np.testing.assert_array_equal(every[0, 0], images.image(7))


def test_threads_change_nothing(folder_set: Path) -> None:
    images, views = ImageSet.open(folder_set), CenterViews(size=8, kind="center+flip")
    order = np.array([5, 0, 3, 3, 1])
    np.testing.assert_array_equal(
        images.all_views(order, views=views, threads=4), images.all_views(order, views=views, threads=1)
    )
    one_by_one = [images.image(int(row)) for row in order]
    for found, expected in zip(images.batch(order, threads=3), one_by_one, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_moved_images_are_found_by_a_new_root(folder_set: Path, root: Path) -> None:
    moved = root.rename(root.with_name("moved"))
    images = ImageSet.open(folder_set)  # keys and labels need no images
    with pytest.raises(InputError, match="does not exist; give the folder of the images with --images"):
        images.image(0)
    assert ImageSet.open(folder_set, root=moved).image(0).shape == (20, 30, 3)
    write_file(folder_set / "log" / "images-root.txt", f"{moved}\n".encode())
    assert ImageSet.open(folder_set).image(0).shape == (20, 30, 3)


def test_unknown_root_is_an_input_error(folder_set: Path) -> None:
    (folder_set / "log" / "images-root.txt").unlink()
    with pytest.raises(InputError, match="none is given"):
        ImageSet.open(folder_set).image(0)


def test_changed_size_and_missing_file_are_refused(folder_set: Path, root: Path) -> None:
    images = ImageSet.open(folder_set)
    with (root / "train" / images.keys[1]).open("ab") as file:
        file.write(b"\0")
    (root / "train" / images.keys[2]).unlink()
    with pytest.raises(InputError, match=r"bytes, but had \d+ when it was indexed"):
        images.image(1)
    with pytest.raises(InputError, match="No such file"):
        images.image(2)


def test_deep_set_refuses_other_bytes_of_the_same_size(tmp_path: Path, root: Path) -> None:
    images = ImageSet.open(index(tmp_path / "deep", FolderSource(split="train", deep=True), root))
    path = root / "train" / images.keys[0]
    images.image(0)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="SHA-256 differs"):
        images.image(0)


def test_link_that_leaves_the_folder_is_followed(folder_set: Path, root: Path) -> None:
    images = ImageSet.open(folder_set)
    path, before = root / "train" / images.keys[0], images.image(0)
    path.rename(root.parent / "outside.png")
    path.symlink_to(root.parent / "outside.png")
    np.testing.assert_array_equal(images.image(0), before)


class TestBadImages:
    @pytest.fixture
    def damaged(self, root: Path) -> ImageSet:
        (root / "train/n0/2.png").write_bytes(b"garbage")
        cut = root / "train/n1/3.png"
        cut.write_bytes(cut.read_bytes()[:-30])
        source = FolderSource(split="train")
        return ImageSet(list_images(source, root), source=source, decode=DecodePolicy(), root=root)

    def find(self, images: ImageSet, *, pixels: bool, threads: int = 1) -> list[Problem]:
        return [problem for _, problems in images.problems(pixels=pixels, threads=threads) for problem in problems]

    def test_headers_show_what_is_no_image_and_pixels_what_is_cut(self, damaged: ImageSet) -> None:
        garbage = Problem("n0/2.png", "is none of JPEG, PNG, GIF, BMP, WEBP, TIFF, PPM")
        assert self.find(damaged, pixels=False) == [garbage]
        assert self.find(damaged, pixels=True) == [garbage, Problem("n1/3.png", "is truncated or damaged")]

    def test_threads_and_blocks_change_nothing(self, damaged: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.images.imageset.CHECKED_AT_ONCE", 4)
        assert [size for size, _ in damaged.problems(pixels=True)] == [4, 2]
        assert self.find(damaged, pixels=True, threads=3) == self.find(damaged, pixels=True)

    def test_what_cannot_be_read_is_no_property_of_the_file(self, damaged: ImageSet, root: Path) -> None:
        (root / "train/n0/2.png").unlink()
        for pixels in (False, True):
            (gone, *_) = self.find(damaged, pixels=pixels)
            assert gone == Problem("n0/2.png", "cannot be read: No such file or directory", is_fixed=False)

    def test_the_error_names_the_command_that_leaves_it_out_and_travels(self, folder_set: Path, root: Path) -> None:
        (root / "train/n0/0.png").write_bytes(bytes((root / "train/n0/0.png").stat().st_size))
        with pytest.raises(CorruptImage, match=r"n0/0\.png is none of JPEG") as caught:
            ImageSet.open(folder_set).image(0)
        error = pickle.loads(pickle.dumps(caught.value))
        assert isinstance(error, BadImages)
        assert error.image_set == "set"
        command = f"smalti index --images {root} --set source.split=train --set decode.corrupt=skip"
        assert str(error).endswith(command)
        error.advise_in_recipe("train-images")
        assert str(error).endswith("--set train-images.decode.corrupt=skip")


class TestDamagedSets:
    def refuse(self, directory: Path) -> str:
        with pytest.raises(CorruptError) as caught:
            ImageSet.open(directory)
        assert caught.value.exit_code == 4
        return str(caught.value)

    @pytest.mark.parametrize("name", ["images.json", "keys.txt", "labels.npy", "sizes.npy"])
    def test_missing_and_cut_files(self, folder_set: Path, name: str) -> None:
        data = (folder_set / name).read_bytes()
        for damaged in (b"", data[:-3], data[: len(data) // 2]):
            (folder_set / name).write_bytes(damaged)
            self.refuse(folder_set)
        (folder_set / name).unlink()
        self.refuse(folder_set)

    def test_future_format(self, folder_set: Path) -> None:
        description = json.loads((folder_set / "images.json").read_bytes())
        (folder_set / "images.json").write_text(json.dumps(description | {"format": 2}))
        assert "has format 2, this version reads 1; install a newer smalti" in self.refuse(folder_set)

    @pytest.mark.parametrize(
        "key", ["../secret.png", "/etc/passwd", "n0/../../x.png", "n0/..", ".", "..", "./x", "n0//x", "n0/", ""]
    )
    def test_keys_that_leave_the_folder(self, folder_set: Path, key: str) -> None:
        keys = (folder_set / "keys.txt").read_text().splitlines()
        (folder_set / "keys.txt").write_text("\n".join([*keys[:2], key, *keys[3:]]) + "\n")
        assert "outside the images" in self.refuse(folder_set)

    def test_labels_out_of_range(self, folder_set: Path) -> None:
        for label in (-1, 2):
            np.save(folder_set / "labels.npy", np.array([0, 0, label, 1, 1, 1], dtype=np.int32))
            assert "are inconsistent" in self.refuse(folder_set)

    def test_header_that_promises_too_much(self, folder_set: Path) -> None:
        data = (folder_set / "labels.npy").read_bytes().replace(b"(6,), }" + b" " * 12, b"(1000000000000,), }")
        (folder_set / "labels.npy").write_bytes(data)
        assert "is damaged" in self.refuse(folder_set)

    def test_pickles_are_not_loaded(self, folder_set: Path) -> None:
        np.save(folder_set / "labels.npy", np.array([object()] * 6), allow_pickle=True)
        self.refuse(folder_set)
