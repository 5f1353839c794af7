"""A folder of images as an image source: root/<class>/<image> as in ImageNet, or root/<image>, which is one class.

Rules. A class is a folder with images; its index is its rank by name (UTF-8 bytes). An image is a file with a known
ending, at any depth below its class folder. Without class folders the images of the folder itself are one class.
Links to files and folders are followed: the key of an image is its path below the root. Problems are links to a folder
that contains them, broken links, names that cannot be keys, and files that cannot be read.
Hidden names, files with other endings, folders without images, and images beside class folders are ignored.
"""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.images.listing import LeftOut, Listing, Problem, escape, name_fault, name_some
from pipeline.trees import Mark, mark

ENDINGS = (".jpeg", ".jpg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
ONE_CLASS = "images"  # the class of a folder without class folders; the folder's name is not part of the key
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}

BESIDE = "images beside the class folders"
HIDDEN = "hidden files or folders"
OTHER = "files that are not images"
EMPTY = "folders without images"

Place = tuple[int, int]
"""Device and inode of a folder."""


class FolderSource(Config):
    """A folder of images, one folder per class. Its path is not part of the config, but given to the run."""

    kind: Literal["folder"] = "folder"
    split: str = Field(
        "", description='folder below the root that holds the class folders, such as "train"; "": the root'
    )
    deep: bool = Field(False, description="read every file once and keep its SHA-256")

    @field_validator("split")
    @classmethod
    def _stays_below_the_root(cls, split: str) -> str:
        if split and any(part in ("", ".", "..") for part in split.split("/")):
            raise ValueError(f"split {split!r} must be a folder below the root, such as train")
        return split


def list_folder(source: FolderSource, root: Path) -> Listing:
    """All images of a folder, in the order of their keys, with problems and ignored files.

    Raises InputError if the folder cannot be listed, holds no images, or holds splits instead of classes.
    """
    folder = root / source.split
    walk = walk_folder(folder)
    classes = sorted(
        {key.partition("/")[0] for key in [*walk.images, *(problem.key for problem in walk.problems)] if "/" in key}
    )
    if any("/" in key for key in walk.images):
        refuse_splits(classes, list(walk.images), folder)
        beside = {key for key in walk.images if "/" not in key}
    else:
        classes, beside = [ONE_CLASS], set()
    if not walk.images and not walk.problems:
        raise InputError(
            f"image folder {folder} has no images ({', '.join(ENDINGS)})",
            path=folder,
            hint="give a folder with a folder of images per class, or with images",
        )
    keys = sorted(walk.images.keys() - beside)  # by code points, which is the order of the UTF-8 bytes
    ranks = {name: rank for rank, name in enumerate(classes)}
    digests, unread = digest_files(folder, keys) if source.deep else (None, [])
    return Listing(
        keys=keys,
        labels=np.array([ranks.get(key.partition("/")[0], 0) for key in keys], dtype=np.int32),
        sizes=np.array([walk.images[key] for key in keys], dtype=np.int64),
        classes=classes,
        digests=digests,
        problems=tuple(sorted([*walk.problems, *unread])),
        left_out=tuple(sorted([*walk.left_out, *(LeftOut(key, BESIDE) for key in beside)])),
        folders=walk.folders,
    )


@dataclass
class Walk:
    """The content of a folder tree. images: key -> bytes.  folders: path below the folder -> mark; "" is the folder."""

    images: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    folders: dict[str, Mark] = field(default_factory=dict)

    def take_all(self, folder: str | Path, prefix: str, above: frozenset[Place]) -> None:
        """Add everything in a folder. above: the folder and its parents."""
        self.folders[prefix.rstrip("/")] = mark(folder)
        with os.scandir(folder) as entries:
            for entry in entries:
                self.take(entry, prefix, above)

    def take(self, entry: os.DirEntry[str], prefix: str, above: frozenset[Place]) -> None:
        """Add one file or folder."""
        key = prefix + entry.name
        if entry.name.startswith("."):
            self.left_out.append(LeftOut(escape(key), HIDDEN))
            return
        try:
            is_folder = entry.is_dir()
            if not is_folder and not _may_be_image(entry):
                self.left_out.append(LeftOut(escape(key), OTHER))
            elif (fault := name_fault(entry.name)) is not None:
                self.problems.append(Problem(escape(key), fault))
            elif is_folder:
                self.enter(entry, key, above)
            elif entry.is_file():
                self.images[key] = entry.stat().st_size
            else:
                fault = "is a link to nothing" if entry.is_symlink() else "is not a file"
                self.problems.append(Problem(key, fault))
        except OSError as cause:
            reason = f"cannot be read: {cause.strerror}"
            self.problems.append(Problem(escape(key), reason, is_fixed=cause.errno == errno.ELOOP))

    def enter(self, entry: os.DirEntry[str], key: str, above: frozenset[Place]) -> None:
        """Add a folder, or a link to one."""
        place = _place(entry.stat())
        if place in above:
            self.problems.append(Problem(key, "is a link to a folder that it lies in"))
            return
        before = len(self.images) + len(self.problems)
        self.take_all(entry.path, f"{key}/", above | {place})
        if len(self.images) + len(self.problems) == before:
            self.left_out.append(LeftOut(key, EMPTY))


def walk_folder(folder: Path) -> Walk:
    """The content of a folder tree. Raises InputError if the folder does not exist or cannot be read."""
    if not folder.is_dir():
        found = f"but there is {'a file' if folder.exists() else 'nothing'}"
        hint = "give the folder of the images with --images"
        message = f"image folder {folder} must hold images, or one folder per class, {found}"
        raise InputError(message, path=folder, hint=hint)
    walk = Walk()
    try:
        walk.take_all(folder, "", frozenset({_place(folder.stat())}))
    except OSError as cause:
        raise InputError(f"image folder {folder} cannot be read: {cause.strerror}", path=folder) from cause
    return walk


def refuse_splits(classes: list[str], keys: list[str], folder: Path) -> None:
    """InputError if the class folders are splits of a data set, each with its own classes."""
    is_nested = all(key.count("/") != 1 for key in keys)
    if {name.lower() for name in classes} <= SPLITS and (len(classes) > 1 or is_nested):
        raise InputError(
            f"image folder {folder} holds {name_some(classes)}, which are splits of a data set and not classes",
            path=folder,
            hint=f"index each split: smalti index --images {folder} --set source.split={classes[0]}",
        )


def digest_files(folder: Path, keys: list[str]) -> tuple[NDArray[np.uint8], list[Problem]]:
    """SHA-256 of each file, uint8 (N, 32), and the files that cannot be read, whose rows are zeros."""
    digests_N32 = np.zeros((len(keys), 32), dtype=np.uint8)
    unread = []
    for row, key in enumerate(keys):
        try:
            with (folder / key).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
        except OSError as cause:
            unread.append(Problem(key, f"cannot be read: {cause.strerror}", is_fixed=False))
        else:
            digests_N32[row] = np.frombuffer(digest, dtype=np.uint8)
    return digests_N32, unread


def _may_be_image(entry: os.DirEntry[str]) -> bool:
    """By its ending; a broken link without ending may have been a folder of images."""
    name = entry.name
    return name.lower().endswith(ENDINGS) or (entry.is_symlink() and "." not in name and not entry.is_file())


def _place(status: os.stat_result) -> Place:
    return (status.st_dev, status.st_ino)
