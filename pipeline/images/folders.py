"""An image folder in ImageNet layout, root/<class>/<image>, as an image source.

Rules. A class is a folder; its index is its rank by name (UTF-8 bytes). An image is a file with a known ending, at any
depth below its class folder. Names that begin with a dot and files with other endings are no images and are passed
over. A link must lead to a file below the root: links that leave it are refused, and so are links to folders, which
would list images twice or without end.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.images.listing import Listing, check_name

ENDINGS = (".jpeg", ".jpg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class FolderSource(Config):
    """A folder of images, one folder per class. Where it lies is no part of the config: the run is given the root."""

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
    """All images of a folder, in the order of their keys. Raises InputError where the rules above are broken."""
    folder = root / source.split
    found: list[tuple[str, int, int]] = []  # key, size, label
    classes = classes_of(folder)
    for label, name in enumerate(classes):
        images = [(key, size, label) for key, size in images_of(folder / name, name + "/", folder.resolve())]
        if not images:
            raise InputError(
                f"class folder {folder / name} has no images ({', '.join(ENDINGS)})",
                path=folder / name,
                hint="add images or remove the folder",
            )
        found += images
    found.sort()  # by code points, which is the order of the UTF-8 bytes
    keys = [key for key, _, _ in found]
    return Listing(
        keys=keys,
        labels=np.array([label for _, _, label in found], dtype=np.int32),
        sizes=np.array([size for _, size, _ in found], dtype=np.int64),
        classes=classes,
        digests=digest_files(folder, keys) if source.deep else None,
    )


def classes_of(folder: Path) -> list[str]:
    """Names of the class folders, sorted. Raises InputError if the folder is missing, unreadable or has none."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise InputError(
            f"image folder {folder} should hold one folder per class, but there is {found}",
            path=folder,
            hint="give the folder of the images with --images",
        )
    with _scan(folder) as entries:
        classes = [entry.name for entry in entries if _is_seen(entry) and _is_folder(entry)]
    if not classes:
        raise InputError(
            f"image folder {folder} has no class folders, expected {folder}/<class>/<image>",
            path=folder,
            hint="put the images of each class into a folder with its name",
        )
    for name in classes:
        check_name(name, str(folder / name))
    return sorted(classes)


def images_of(folder: Path, prefix: str, root: Path) -> Iterator[tuple[str, int]]:
    """Key and size in bytes of each image at any depth below a class folder, in no order."""
    with _scan(folder) as entries:
        for entry in entries:
            if not _is_seen(entry):
                continue
            if _is_folder(entry):
                check_name(entry.name, entry.path)
                yield from images_of(Path(entry.path), f"{prefix}{entry.name}/", root)
            elif entry.name.lower().endswith(ENDINGS):
                check_name(entry.name, entry.path)
                yield prefix + entry.name, _size(entry, root)


def digest_files(folder: Path, keys: list[str]) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """SHA-256 of each file, uint8 (N, 32)."""
    digests_N32 = np.empty((len(keys), 32), dtype=np.uint8)
    for row, key in enumerate(keys):
        try:
            with (folder / key).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
        except OSError as cause:
            raise InputError(f"image {folder / key} cannot be read: {cause.strerror}", path=folder / key) from cause
        digests_N32[row] = np.frombuffer(digest, dtype=np.uint8)
    return digests_N32


def _scan(folder: Path) -> os._ScandirIterator[str]:
    try:
        return os.scandir(folder)
    except OSError as cause:
        raise InputError(f"image folder {folder} cannot be read: {cause.strerror}", path=folder) from cause


def _is_seen(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    if entry.is_symlink() and entry.is_dir():
        raise InputError(
            f"{entry.path} is a link to a folder, expected a folder",
            path=entry.path,
            hint="copy or bind-mount the folder",
        )
    return entry.is_dir(follow_symlinks=False)


def _size(entry: os.DirEntry[str], root: Path) -> int:
    try:
        if entry.is_symlink() and not Path(entry.path).resolve(strict=True).is_relative_to(root):
            raise InputError(
                f"image {entry.path} is a link that leaves {root}",
                path=entry.path,
                hint="copy the file into the folder",
            )
        return entry.stat().st_size
    except OSError as cause:
        raise InputError(f"image {entry.path} cannot be read: {cause.strerror}", path=entry.path) from cause
