"""Sources: what is listed, in which order, under which id, and what is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from pipeline.errors import InputError
from pipeline.images import DigitsSource, FolderSource, Problem, describe_left_out, identify, list_images
from pipeline.images.digits import draw_digits, load_digits, share_among

FOLDER = FolderSource()


def content_id(source: DigitsSource | FolderSource, root: Path | None = None) -> str:
    found = identify(source, root)
    return found if isinstance(found, str) else found.look().content


def write(path: Path, data: bytes = b"12345") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("n02/b.JPEG", "n02/a.png", "n01/z.jpg", "n01/deep/er/y.jpg"):
        write(tmp_path / "images" / name, name.encode())
    return tmp_path / "images"


def test_folder_is_sorted_and_labelled(root: Path) -> None:
    listing = list_images(FOLDER, root)
    assert listing.keys == ["n01/deep/er/y.jpg", "n01/z.jpg", "n02/a.png", "n02/b.JPEG"]
    assert listing.labels.tolist() == [0, 0, 1, 1]
    assert listing.sizes.tolist() == [len(key) for key in listing.keys]
    assert listing.classes == ["n01", "n02"]
    assert (listing.labels.dtype, listing.sizes.dtype, listing.digests) == (np.int32, np.int64, None)


def test_order_is_that_of_utf8_bytes(tmp_path: Path) -> None:
    names = ["é", "z", "Z", "a-b", "a", "日本", "🐕"]
    for name in names:
        write(tmp_path / name / f"{name}.png")
    listing = list_images(FOLDER, tmp_path)
    assert listing.classes == sorted(names, key=str.encode)
    assert listing.keys == sorted(listing.keys, key=str.encode)
    # "a-b/" sorts before "a/", though the class "a" comes before "a-b": a label belongs to its key all the same
    assert [listing.classes[label] for label in listing.labels] == [key.split("/")[0] for key in listing.keys]


def test_split_is_a_folder_below_the_root(root: Path) -> None:
    assert list_images(FolderSource(split=root.name), root.parent).keys == list_images(FOLDER, root).keys
    for split in ("..", "/etc", "train/../..", "train/"):
        with pytest.raises(ValidationError):
            FolderSource(split=split)


def test_hidden_and_foreign_files_are_counted_and_change_no_identity(root: Path) -> None:
    before = content_id(FOLDER, root)
    for name in ("README.txt", "n01/.DS_Store", "n01/._z.jpg", "n01/list.csv", ".cache/a/x.png", "n01/.thumbs/z.jpg"):
        write(root / name)
    write(root / "stray.png")
    (root / "n03/empty").mkdir(parents=True)
    assert content_id(FOLDER, root) == before
    listing = list_images(FOLDER, root)
    assert listing.classes == ["n01", "n02"]
    assert describe_left_out(listing.left_out) == (
        "files that are not images: 2 (README.txt, n01/list.csv); folders without images: 2 (n03, n03/empty); "
        "hidden files or folders: 4 (.cache, n01/.DS_Store, n01/._z.jpg, and 1 more); "
        "images beside the class folders: 1 (stray.png)"
    )


def test_content_id_follows_names_sizes_and_labels_only(root: Path) -> None:
    before = content_id(FOLDER, root)
    write(root / "n02/a.png", b"N02/A.PNG")  # as many bytes
    os.utime(root / "n02/b.JPEG", (0, 0))
    moved = root.rename(root.with_name("moved"))
    assert content_id(FOLDER, moved) == before
    ids = {before}
    write(moved / "n02/a.png", b"longer than before")
    ids.add(content_id(FOLDER, moved))
    (moved / "n02/a.png").rename(moved / "n02/c.png")
    ids.add(content_id(FOLDER, moved))
    write(moved / "n00/x.png")
    ids.add(content_id(FOLDER, moved))
    assert len(ids) == 4


def test_deep_id_follows_the_bytes(root: Path) -> None:
    deep = FolderSource(deep=True)
    before = content_id(deep, root)
    assert before != content_id(FOLDER, root)
    write(root / "n02/a.png", b"N02/A.PNG")
    assert content_id(deep, root) != before


def test_link_inside_is_an_image_and_its_size_that_of_the_target(root: Path) -> None:
    (root / "n01/link.jpg").symlink_to("../n02/b.JPEG")
    listing = list_images(FOLDER, root)
    assert listing.sizes[listing.keys.index("n01/link.jpg")] == len("n02/b.JPEG")


def test_root_may_itself_be_a_link(root: Path) -> None:
    (root / "n01/link.jpg").symlink_to(root / "n02/b.JPEG")
    root.with_name("link").symlink_to(root)
    assert content_id(FOLDER, root.with_name("link")) == content_id(FOLDER, root)


def refuse(root: Path | None, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        list_images(FOLDER, root)
    assert "\n" not in str(caught.value)


def problems(root: Path) -> dict[str, str]:
    return {key: reason for key, reason, _ in list_images(FOLDER, root).problems}


def test_a_flat_folder_is_one_class(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "c.webp"):
        write(tmp_path / "flat" / name)
    (tmp_path / "flat" / "notes").mkdir()
    listing = list_images(FOLDER, tmp_path / "flat")
    assert (listing.keys, listing.labels.tolist(), listing.classes) == (
        ["a.jpg", "b.PNG", "c.webp"],
        [0] * 3,
        ["images"],
    )
    moved = (tmp_path / "flat").rename(tmp_path / "moved")  # the name of the folder is no part of the set
    assert list_images(FOLDER, moved).classes == ["images"]


def test_links_to_folders_and_out_of_the_root_are_followed(root: Path) -> None:
    write(root.parent / "elsewhere/pic.png", b"1234567")
    (root / "n03").symlink_to(root.parent / "elsewhere")
    (root / "n01/inner").symlink_to("../n02")
    (root / "n01/out.jpg").symlink_to(root.parent / "elsewhere/pic.png")
    listing = list_images(FOLDER, root)
    assert listing.problems == ()
    assert listing.classes == ["n01", "n02", "n03"]
    assert {"n01/inner/a.png", "n01/out.jpg", "n03/pic.png"} <= set(listing.keys)
    before = content_id(FOLDER, root)
    (root / "n03").unlink()
    (root.parent / "elsewhere").rename(root / "n03")  # a folder instead of a link: the same paths, the same set
    (root / "n01/out.jpg").unlink()
    write(root / "n01/out.jpg", b"1234567")
    assert content_id(FOLDER, root) == before


def test_all_problems_are_found_in_one_pass(root: Path) -> None:
    before = content_id(FOLDER, root)
    (root / "n01/loop").symlink_to("..")
    (root / "n02/self.png").symlink_to("self.png")
    (root / "n01/broken.jpg").symlink_to("nowhere.jpg")
    (root / "n03").symlink_to("nowhere")
    os.mkfifo(root / "n02/pipe.png")
    (root / "n01/notes.txt").symlink_to("nowhere")  # would not be an image if it were there
    assert problems(root) == {
        "n01/broken.jpg": "is a link to nothing",
        "n01/loop": "is a link to a folder that it lies in",
        "n02/pipe.png": "is not a file",
        "n02/self.png": "cannot be read: Too many levels of symbolic links",
        "n03": "is a link to nothing",
    }
    assert content_id(FOLDER, root) != before  # what may be skipped is a part of the set's identity


def test_missing_and_empty_folders_are_refused(root: Path, tmp_path: Path) -> None:
    refuse(None, "none is given")
    refuse(tmp_path / "nowhere", "nowhere must hold images, or one folder per class, but there is nothing")
    refuse(write(tmp_path / "file"), "but there is a file")
    (tmp_path / "empty/n01").mkdir(parents=True)
    refuse(tmp_path / "empty", "has no images")


def test_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    write(tmp_path / "set/train/n01/a.png")
    refuse(tmp_path / "set", "holds train, which are splits.*--set source.split=train")
    write(tmp_path / "set/val/a.png")
    refuse(tmp_path / "set", "holds train, val, which are splits of a data set and not classes")
    write(tmp_path / "vehicles/train/a.png")
    assert list_images(FOLDER, tmp_path / "vehicles").classes == ["train"]
    write(tmp_path / "set/cat/a.png")
    assert list_images(FOLDER, tmp_path / "set").classes == ["cat", "train", "val"]


def test_unreadable_folders(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan, denied = os.scandir, "n01"

    def deny(path: Path) -> object:  # mode bits would not bind the user root
        if Path(path).name == denied:
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", deny)
    assert list_images(FOLDER, root).problems == (Problem("n01", "cannot be read: Permission denied", is_fixed=False),)
    denied = root.name
    refuse(root, "images cannot be read: Permission denied")


@pytest.mark.parametrize(("name", "shown"), [(b"new\nline.jpg", "new\\nline.jpg"), (b"\xff.jpg", "\\udcff.jpg")])
def test_names_that_cannot_be_keys_are_problems(root: Path, name: bytes, shown: str) -> None:
    try:
        Path(os.fsdecode(os.fsencode(root / "n01") + b"/" + name)).write_bytes(b"1")
    except OSError:
        pytest.skip("this file system does not take such names")
    assert list(problems(root)) == [f"n01/{shown}"]


class TestDigits:
    def test_split_is_exact_disjoint_and_stratified(self) -> None:
        parts = [list_images(DigitsSource(split=split)) for split in ("train", "validation", "held-out")]
        whole = list_images(DigitsSource(split="all"))
        assert [len(part) for part in (*parts, whole)] == [1257, 180, 360, 1797]
        assert sorted(key for part in parts for key in part.keys) == whole.keys
        assert all(part.keys == sorted(part.keys) for part in parts)
        for part, share in zip(parts, (0.7, 0.1, 0.2), strict=True):
            shares = np.bincount(part.labels) / np.bincount(whole.labels)
            assert (np.abs(shares - share) < 0.006).all()
        np.testing.assert_array_equal(whole.labels, load_digits()[1])

    def test_split_is_pinned(self) -> None:
        """Another split would change every key and score of the digits recipes; the held-out images are those of the
        split into two parts that older versions had."""
        held_out, validation = (list_images(DigitsSource(split=split)).keys for split in ("held-out", "validation"))
        assert hashlib.sha256("\n".join(held_out).encode()).hexdigest() == (
            "c2398cdd3b101e40e17996b124afae9ee2aa62e8767fe0830f674e51486efdc4"
        )
        assert validation[:6] == ["digit-0020", "digit-0023", "digit-0031", "digit-0035", "digit-0041", "digit-0079"]

    @pytest.mark.parametrize(
        "fields", [{}, {"validation": 0.0}, {"held_out": 0.5}, {"validation": 0.33, "split_seed": 2}]
    )
    def test_source_knows_its_counts(self, fields: dict[str, float]) -> None:
        for split in ("train", "validation", "held-out", "all"):
            source = DigitsSource.model_validate({"split": split, **fields})
            assert len(list_images(source)) == source.images

    def test_validation_takes_from_the_training_images_alone(self) -> None:
        with_it, without = (DigitsSource(validation=share) for share in (0.1, 0.0))
        assert set(list_images(with_it).keys) < set(list_images(without).keys)
        assert len(list_images(without)) == 1437

    def test_some_digits_are_left_to_train_on(self) -> None:
        with pytest.raises(ValidationError, match=r"held_out 0.7 and validation 0.3 leave no digit to train on"):
            DigitsSource(held_out=0.7, validation=0.3)

    def test_other_seed_is_another_split(self) -> None:
        assert list_images(DigitsSource(split_seed=1)).keys != list_images(DigitsSource()).keys

    def test_pixels(self) -> None:
        images = draw_digits(["digit-0000", "digit-1796"], 32)
        assert (images.shape, images.dtype) == ((2, 32, 32, 3), np.uint8)
        assert images[:, 0, 0].max() == 0  # the background is black
        assert images.max() == 255
        grey = Image.fromarray((load_digits()[0][1796] * (255 / 16)).round().astype(np.uint8))
        expected = np.asarray(grey.resize((32, 32), Image.Resampling.BICUBIC), dtype=int)
        np.testing.assert_allclose(images[1], np.repeat(expected[:, :, None], 3, axis=2), atol=1)

    def test_other_data_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.images.digits.SHA256", "0" * 64)
        with pytest.raises(InputError, match="digits of the installed scikit-learn"):
            load_digits.__wrapped__()

    def test_content_id_imports_neither_scikit_learn_nor_torch(self) -> None:
        code = (
            "import sys; from pipeline.images import DigitsSource, identify; identify(DigitsSource());"
            "print(sorted({'torch', 'sklearn', 'scipy', 'models'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


def test_share_among_gives_the_whole() -> None:
    assert share_among(np.array([5, 3, 2]), 4) == [2, 1, 1]
    assert share_among(np.array([1, 1, 1]), 2) == [1, 1, 0]
