"""Image sets on disk: the list of the images, while the images stay where they are.

| file | holds |
|---|---|
| `images.json` | format version, source, decode policy, class names, number of images, content id |
| `keys.txt` | one key per line, UTF-8, in the order of the set |
| `labels.npy`, `sizes.npy` | int32 and int64 (N,): index into the class names; bytes of each file |
| `digests.npy` | uint8 (N, 32): SHA-256 of each file; only of a deep index |
| `skipped.jsonl` | what was left out and why; only with `corrupt: skip` |

The root of the images depends on the machine: it is remembered in `log/images-root.txt`, which no digest covers.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from pipeline.durable import write_file
from pipeline.errors import CorruptError, InputError
from pipeline.images.decoding import CorruptImage, DecodePolicy, decode, read_file
from pipeline.images.digits import DigitsSource, draw_digits
from pipeline.images.folders import FolderSource
from pipeline.images.listing import Listing, digest_listing
from pipeline.images.sources import ImageSource, need_root
from pipeline.images.views import ViewPolicy

Item = TypeVar("Item")
Result = TypeVar("Result")

FORMAT = 1
ROOT_FILE = Path("log") / "images-root.txt"
# What no line of keys may hold; searched for in the whole text at once, because there may be a million lines.
UNSAFE = ("\n\n", "\n/", "//", "/\n", "/./", "\n./", "\n.\n", "/.\n", "/../", "\n../", "\n..\n", "/..\n", "\0", "\r")


@dataclass(frozen=True)
class Skipped:
    """An image that was left out, and why."""

    key: str
    reason: str


class ImageSet:
    """The images of an index, read one by one at random: `image_set.image(7)` is uint8 (H, W, 3).

    Every read checks the file's size (and SHA-256, if the index is deep) against the list. Threads may share it.
    """

    def __init__(
        self, listing: Listing, *, source: DigitsSource | FolderSource, decode: DecodePolicy, root: Path | None = None
    ):
        self.listing = listing
        self.source = source
        self.decode_policy = decode
        self.root = root

    @classmethod
    def open(cls, directory: Path, *, root: Path | None = None) -> ImageSet:
        """The image set of an artifact directory. `root`: the folder of the images, if not the remembered one.

        Raises CorruptError if the files are missing, cut or do not fit each other; digests are the store's matter.
        """
        description = _read_description(directory)
        listing = _read_listing(directory, classes=description["classes"], images=description["images"])
        try:
            source = TypeAdapter[DigitsSource | FolderSource](ImageSource).validate_python(description["source"])
            policy = DecodePolicy.model_validate(description["decode"])
        except ValidationError as cause:
            raise CorruptError(
                f"image set {directory}: images.json does not fit this version", path=directory
            ) from cause
        return cls(listing, source=source, decode=policy, root=root or recall_root(directory))

    def __len__(self) -> int:
        return len(self.listing)

    @property
    def keys(self) -> list[str]:
        return self.listing.keys

    @property
    def labels(self) -> NDArray[np.int32]:
        return self.listing.labels

    @property
    def classes(self) -> list[str]:
        return self.listing.classes

    @cached_property
    def folder(self) -> Path:
        """The folder below which the keys lie. Raises InputError if no root is known or it is gone."""
        assert isinstance(self.source, FolderSource)
        folder = need_root(self.root) / self.source.split
        if not folder.is_dir():
            raise InputError(
                f"the images should lie in {folder}, but there is no such folder",
                path=folder,
                hint="give the folder of the images with --images",
            )
        return folder.resolve()

    @cached_property
    def _digits(self) -> NDArray[np.uint8]:
        assert isinstance(self.source, DigitsSource)
        return draw_digits(self.keys, self.source.size)

    def image(self, index: int) -> NDArray[np.uint8]:
        """Image `index`, uint8 (H, W, 3). Raises InputError if it is gone or changed, CorruptImage if undecodable."""
        if isinstance(self.source, DigitsSource):
            digit_HW3: NDArray[np.uint8] = self._digits[index]
            return digit_HW3
        return decode(self._bytes(index), self.decode_policy, name=str(self.folder / self.keys[index]))

    def batch(self, indices: Sequence[int], *, threads: int = 1) -> list[NDArray[np.uint8]]:
        """Several images, each of its own size, in the order asked for."""
        return _map(self.image, indices, threads)

    def chosen_views(
        self, indices: Sequence[int], chosen: Sequence[int], *, views: ViewPolicy, threads: int = 1
    ) -> NDArray[np.uint8]:
        """One view of each image: view `chosen[b]` of image `indices[b]`, uint8 (B, size, size, 3)."""

        def see(pair: tuple[int, int]) -> NDArray[np.uint8]:
            return views.apply(self.image(pair[0]), pair[1], index=pair[0])

        return np.stack(_map(see, list(zip(map(int, indices), map(int, chosen), strict=True)), threads))

    def all_views(self, indices: Sequence[int], *, views: ViewPolicy, threads: int = 1) -> NDArray[np.uint8]:
        """All views of each image, uint8 (B, count, size, size, 3)."""

        def see(index: int) -> NDArray[np.uint8]:
            return views.apply_all(self.image(index), index=index)

        return np.stack(_map(see, [int(index) for index in indices], threads))

    def _bytes(self, index: int) -> bytes:
        path = self.folder / self.keys[index]
        if not path.resolve().is_relative_to(self.folder):
            raise InputError(
                f"image {path} leads out of {self.folder}", path=path, hint="copy the file into the folder"
            )
        data = read_file(path)
        if len(data) != self.listing.sizes[index]:
            raise InputError(
                f"image {path} has {len(data)} bytes, but had {self.listing.sizes[index]} when it was indexed",
                path=path,
                hint="restore it, or index the folder anew",
            )
        digests = self.listing.digests
        if digests is not None and hashlib.sha256(data).digest() != digests[index].tobytes():
            raise InputError(
                f"image {path} is not the file that was indexed: its SHA-256 differs",
                path=path,
                hint="restore it, or index the folder anew",
            )
        return data


def index_files(
    listing: Listing, *, source: DigitsSource | FolderSource, decode: DecodePolicy, skipped: Sequence[Skipped] = ()
) -> dict[str, bytes]:
    """The data files of an image set by name, the same bytes for the same arguments."""
    description = {
        "format": FORMAT,
        "source": source.model_dump(mode="json"),
        "decode": decode.model_dump(mode="json"),
        "classes": listing.classes,
        "images": len(listing),
        "list_digest": digest_listing(listing),
    }
    files = {
        "images.json": json.dumps(description, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n",
        "keys.txt": "".join(f"{key}\n" for key in listing.keys).encode(),
        "labels.npy": _npy(listing.labels.astype("<i4")),
        "sizes.npy": _npy(listing.sizes.astype("<i8")),
    }
    if listing.digests is not None:
        files["digests.npy"] = _npy(listing.digests)
    if decode.corrupt == "skip":
        lines = [json.dumps({"key": one.key, "reason": one.reason}, ensure_ascii=False) + "\n" for one in skipped]
        files["skipped.jsonl"] = "".join(lines).encode()
    return files


def drop_corrupt(image_set: ImageSet, *, threads: int = 1) -> tuple[Listing, list[Skipped]]:
    """Decode every image once; the listing of those that can be decoded, and the others with the reason.

    Raises InputError when more than `max_skipped` images cannot, CorruptImage at the first under the policy `fail`.
    """

    def why_not(index: int) -> str | None:
        try:
            image_set.image(index)
        except CorruptImage as error:
            if policy.corrupt == "fail":
                raise
            return error.reason
        return None

    policy = image_set.decode_policy
    reasons = _map(why_not, range(len(image_set)), threads)
    skipped = [Skipped(key, why) for key, why in zip(image_set.keys, reasons, strict=True) if why is not None]
    if len(skipped) > policy.max_skipped:
        raise InputError(
            f"{len(skipped)} of {len(image_set)} images cannot be decoded, {policy.max_skipped} may be skipped; "
            f"the first is {skipped[0].key}, which {skipped[0].reason}",
            path=skipped[0].key,
            hint="repair or remove them, or raise decode.max_skipped",
        )
    kept = np.flatnonzero([why is None for why in reasons])
    if not len(kept):
        raise InputError(f"none of the {len(image_set)} images can be decoded; the first {skipped[0].reason}")
    return image_set.listing.keep(kept), skipped


def remember_root(directory: Path, root: Path) -> None:
    """Note beside the artifact where its images lie on this machine."""
    file = directory / ROOT_FILE
    write_file(file, f"{root.resolve()}\n".encode())


def recall_root(directory: Path) -> Path | None:
    """The remembered root of the images, if any."""
    file = directory / ROOT_FILE
    return Path(file.read_text(encoding="utf-8").rstrip("\n")) if file.is_file() else None


def _map(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    if threads == 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _read_npy(file: Path) -> NDArray[Any]:
    """An array; mapped first, so that a header that promises more than the file holds allocates nothing."""
    return np.array(np.load(file, mmap_mode="r", allow_pickle=False))


def _read_description(directory: Path) -> dict[str, Any]:
    try:
        description = json.loads((directory / "images.json").read_bytes())
        known = description["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as cause:
        raise CorruptError(
            f"{directory} is not an image set: images.json is missing or damaged", path=directory
        ) from cause
    if known != FORMAT:
        raise CorruptError(
            f"image set {directory} has format {known}, this version knows {FORMAT}",
            path=directory,
            hint="install a newer smalti",
        )
    if not {"source", "decode", "classes", "images", "list_digest"} <= description.keys():
        raise CorruptError(f"image set {directory}: images.json lacks fields", path=directory)
    return dict(description)


def _read_listing(directory: Path, *, classes: list[str], images: int) -> Listing:
    try:
        text = "\n" + (directory / "keys.txt").read_bytes().decode()
        labels, sizes = _read_npy(directory / "labels.npy"), _read_npy(directory / "sizes.npy")
        digests_file = directory / "digests.npy"
        digests = _read_npy(digests_file) if digests_file.exists() else None
    except (OSError, ValueError, EOFError) as cause:
        raise CorruptError(f"image set {directory} is damaged: {cause}", path=directory) from cause
    if not text.endswith("\n") or any(part in text for part in UNSAFE):
        raise CorruptError(f"image set {directory}: keys.txt is cut or names a file outside the images", path=directory)
    keys = text[1:-1].split("\n")
    shapes = {array.shape for array in (labels, sizes)} | ({digests.shape[:1]} if digests is not None else set())
    if shapes != {(images,)} or len(keys) != images or labels.min() < 0 or labels.max() >= len(classes):
        raise CorruptError(
            f"image set {directory}: keys, labels, sizes and classes do not fit each other", path=directory
        )
    return Listing(keys, labels, sizes, classes, digests)
