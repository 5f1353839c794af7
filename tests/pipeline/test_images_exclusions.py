"""Lists of images to leave out: what a line means, what it changes, and lines that mean nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.images import (
    FolderSource,
    Problem,
    exclude,
    identify_exclusions,
    list_images,
    read_exclusions,
    write_exclusions,
)

KEYS = ["n01/a b.jpg", "n01/ü#.png", "n02/x.png", "n03/deep/y.png", "n03/z.png"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for key in KEYS:
        path = tmp_path / "images" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(key.encode())
    return tmp_path / "images"


def written(root: Path, text: str) -> Path:
    file = root.parent / "exclude.txt"
    file.write_text(text, encoding="utf-8")
    return file


def test_images_and_folders_are_left_out_as_if_they_were_not_there(root: Path) -> None:
    file = written(root, "# bad ones\n\nn01/ü#.png\r\n./n02/\nn03/deep")
    listing = exclude(list_images(FolderSource(), root), file)
    for key in ("n01/ü#.png", "n02/x.png", "n03/deep/y.png"):
        (root / key).unlink()
    without = list_images(FolderSource(), root)
    assert listing.keys == without.keys == ["n01/a b.jpg", "n03/z.png"]
    assert listing.classes == without.classes == ["n01", "n03"]
    assert listing.labels.tolist() == without.labels.tolist() == [0, 1]
    assert listing.sizes.tolist() == without.sizes.tolist()


def test_problems_and_what_is_left_out_anyway_may_be_named(root: Path) -> None:
    (root / "n01/broken.png").symlink_to("nowhere")
    (root / "notes.txt").touch()
    listing = exclude(list_images(FolderSource(), root), written(root, "n01/broken.png\nnotes.txt\n"))
    assert (listing.keys, listing.problems, listing.left_out) == (KEYS, (), ())


def test_lines_that_match_nothing_are_named(root: Path) -> None:
    file = written(root, "n02/x.png\n#\nn02/X.png\nn0\n")
    with pytest.raises(InputError, match=r"2 of 3 lines of .* line 3: 'n02/X.png', line 4: 'n0'"):
        exclude(list_images(FolderSource(), root), file)


def test_nothing_left_and_unreadable_lists_are_refused(root: Path) -> None:
    with pytest.raises(InputError, match="excludes all of the 5 images"):
        exclude(list_images(FolderSource(), root), written(root, "n01\nn02\nn03\n"))
    with pytest.raises(InputError, match="cannot be read: No such file"):
        identify_exclusions(root / "nothing.txt")
    (root / "latin.txt").write_bytes(b"\xfc.png\n")
    with pytest.raises(InputError, match="is not UTF-8"):
        identify_exclusions(root / "latin.txt")


def test_identity_is_what_is_named(root: Path) -> None:
    one = identify_exclusions(written(root, "n02/x.png\nn01\n"))
    assert identify_exclusions(written(root, "# why\nn01/\nn02/x.png\nn01\n")) == one
    assert identify_exclusions(written(root, "n02/x.png\n")) != one


def test_written_lists_are_read_again(root: Path) -> None:
    text = write_exclusions([Problem("n01/a b.jpg", "is empty"), Problem("n02", "is a link to nothing")], ["n03"])
    assert list(read_exclusions(written(root, text))) == ["n01/a b.jpg", "n02", "n03"]
    assert "# is empty:\nn01/a b.jpg\n" in text
