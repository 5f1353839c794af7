"""Image sets on disk: the list of the images; the images are not copied.

| file | holds |
|---|---|
| `images.json` | format version, source, decode policy, class names, number of images, content id |
| `keys.txt` | one key per line, UTF-8, in the order of the set |
| `labels.npy`, `sizes.npy` | int32 and int64 (N,): index into the class names; bytes of each file |
| `digests.npy` | uint8 (N, 32): SHA-256 of each file; only of a deep index |
| `skipped.jsonl` | images that cannot be used, and why; only with `corrupt: skip` |
The root of the images depends on the machine: it is in `log/images-root.txt`, outside of the digests.
"""

from __future__ import annotations

import hashlib
import io
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from pipeline.errors import CorruptError, InputError
from pipeline.images.decoding import CorruptImage, DecodePolicy, UnreadableImage, check_header, decode, read_file
from pipeline.images.digits import DigitsSource, draw_digits
from pipeline.images.folders import FolderSource
from pipeline.images.listing import Listing, Problem, digest_listing
from pipeline.images.sources import ImageSource, need_root
from pipeline.images.views import ViewPolicy

Met = Callable[[int, NDArray[np.uint8]], None]
"""Called with (index, image) for each decoded image of a set."""

Item = TypeVar("Item")
Result = TypeVar("Result")

FORMAT = 1
CHECKED_AT_ONCE = 64  # images per task of a thread
ROOT_FILE = Path("log") / "images-root.txt"
LOOKED_AT = 16  # images whose size is taken for that of all
# Not allowed in keys; searched in the whole text at once, because there may be a million lines.
UNSAFE = ("\n\n", "\n/", "//", "/\n", "/./", "\n./", "\n.\n", "/.\n", "/../", "\n../", "\n..\n", "/..\n", "\0", "\r")


def ignore(index: int, image_HW3: NDArray[np.uint8]) -> None:
    """Do nothing."""


class ImageSet:
    """The images of an index, with random access: `image_set.image(7)` is uint8 (H, W, 3).

    Every read checks the file's size (and SHA-256, if the index is deep) against the list. Safe to use from several threads.
    """

    def __init__(
        self,
        listing: Listing,
        *,
        source: DigitsSource | FolderSource,
        decode: DecodePolicy,
        root: Path | None = None,
        key: str = "",
    ):
        self.listing = listing
        self.keys, self.labels, self.classes = listing.keys, listing.labels, listing.classes
        self.source = source
        self.decode_policy = decode
        self.root = root
        self.key = key

    @classmethod
    def open(cls, directory: Path, *, root: Path | None = None) -> ImageSet:
        """The image set of an artifact directory. `root`: the folder of the images, default the recorded one.

        Raises CorruptError if files are missing, truncated or inconsistent; digests are checked by the store.
        """
        description = _read_description(directory)
        listing = _read_listing(directory, classes=description["classes"], images=description["images"])
        try:
            source = TypeAdapter[DigitsSource | FolderSource](ImageSource).validate_python(description["source"])
            policy = DecodePolicy.model_validate(description["decode"])
        except ValidationError as cause:
            message = f"image set {directory}: images.json does not fit this version"
            raise CorruptError(message, path=directory) from cause
        return cls(listing, source=source, decode=policy, root=root or recall_root(directory), key=directory.name)

    def __len__(self) -> int:
        return len(self.listing)

    @cached_property
    def folder(self) -> Path:
        """The folder of the keys. Raises InputError if no root is known or the folder does not exist."""
        assert isinstance(self.source, FolderSource)
        folder = need_root(self.root) / self.source.split
        if not folder.is_dir():
            raise InputError(
                f"the folder of the images {folder} does not exist",
                path=folder,
                hint="give the folder of the images with --images",
            )
        return folder.resolve()

    @cached_property
    def _digits(self) -> NDArray[np.uint8]:
        assert isinstance(self.source, DigitsSource)
        return draw_digits(self.keys, self.source.size)

    def image(self, index: int) -> NDArray[np.uint8]:
        """Image `index`, uint8 (H, W, 3). Raises UnreadableImage if it is missing or changed, CorruptImage if undecodable."""
        if isinstance(self.source, DigitsSource):
            digit_HW3: NDArray[np.uint8] = self._digits[index]
            return digit_HW3
        path = self._path(index)
        try:
            return decode(self._bytes(index), self.decode_policy, name=str(path))
        except CorruptImage as error:
            raise CorruptImage(error.reason, path=str(path), command=self.command, image_set=self.key) from error

    @property
    def command(self) -> str:
        """The command that indexes these images."""
        assert isinstance(self.source, FolderSource)
        settings = {"split": self.source.split, "deep": "true" if self.source.deep else ""}
        chosen = "".join(f" --set source.{name}={shlex.quote(value)}" for name, value in settings.items() if value)
        return f"smalti index --images {shlex.quote(str(self.root))}{chosen}"

    def problem(self, index: int, *, pixels: bool) -> Problem | None:
        """Why image `index` cannot be used; None if it can. pixels: decode it, instead of reading only its header."""
        try:
            if pixels:
                self.image(index)
            elif isinstance(self.source, FolderSource):
                check_header(self._path(index), self.decode_policy)
        except CorruptImage as error:
            return Problem(self.keys[index], error.reason)
        except UnreadableImage as error:
            return Problem(self.keys[index], error.reason, is_fixed=False)
        return None

    def problems(self, *, pixels: bool, threads: int = 1) -> Iterator[tuple[int, list[Problem]]]:
        """Every image that cannot be used, in the order of the set: (size of a block, its problems) block by block."""

        def check(start: int) -> tuple[int, list[Problem]]:
            block = range(start, min(start + CHECKED_AT_ONCE, len(self)))
            found = [self.problem(index, pixels=pixels) for index in block]
            return len(block), [problem for problem in found if problem is not None]

        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(check, range(0, len(self), CHECKED_AT_ONCE))

    def common_pixels(self) -> int | None:
        """Pixels per side of the images, if all are squares of one size; of files, 16 evenly spaced ones are read.

        Only headers are read. InputError or CorruptImage for a file that is missing or cannot be read.
        """
        if isinstance(self.source, DigitsSource):
            return self.source.size
        chosen = np.unique(np.linspace(0, len(self) - 1, LOOKED_AT).round().astype(int))
        sizes = {check_header(self._path(int(index)), self.decode_policy) for index in chosen}
        widths = {side for size in sizes for side in size}
        return widths.pop() if len(widths) == 1 else None

    def batch(self, indices: Sequence[int], *, threads: int = 1) -> list[NDArray[np.uint8]]:
        """Several images, each of its own size, in the order of `indices`."""
        return _map(self.image, indices, threads)

    def chosen_views(
        self, indices: Sequence[int], chosen: Sequence[int], *, views: ViewPolicy, threads: int = 1
    ) -> NDArray[np.uint8]:
        """One view of each image: view `chosen[b]` of image `indices[b]`, uint8 (B, size, size, 3)."""

        def see(pair: tuple[int, int]) -> NDArray[np.uint8]:
            return views.apply(self.image(pair[0]), pair[1], index=pair[0])

        return np.stack(_map(see, list(zip(map(int, indices), map(int, chosen), strict=True)), threads))

    def all_views(
        self, indices: Sequence[int], *, views: ViewPolicy, threads: int = 1, met: Met = ignore
    ) -> NDArray[np.uint8]:
        """All views of each image, uint8 (B, count, size, size, 3). met: called for each decoded image."""

        def see(index: int) -> NDArray[np.uint8]:
            image_HW3 = self.image(index)
            met(index, image_HW3)
            return views.apply_all(image_HW3, index=index)

        return np.stack(_map(see, [int(index) for index in indices], threads))

    def _path(self, index: int) -> Path:
        return self.folder / self.keys[index]

    def _bytes(self, index: int) -> bytes:
        path = self._path(index)
        data, size = read_file(path), int(self.listing.sizes[index])
        anew = "restore it, or list the folder again: smalti index or run with --rescan"
        if len(data) != size:
            raise UnreadableImage(f"has {len(data)} bytes, but had {size} when it was indexed", path=path, hint=anew)
        digests = self.listing.digests
        if digests is not None and hashlib.sha256(data).digest() != digests[index].tobytes():
            raise UnreadableImage("is not the file that was indexed: its SHA-256 differs", path=path, hint=anew)
        return data


def index_files(
    listing: Listing, *, source: DigitsSource | FolderSource, decode: DecodePolicy, skipped: Sequence[Problem] = ()
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


def recall_root(directory: Path) -> Path | None:
    """The recorded root of the images, if any."""
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
    """An array; mapped first, so that a forged shape allocates nothing."""
    return np.array(np.load(file, mmap_mode="r", allow_pickle=False))


def _read_description(directory: Path) -> dict[str, Any]:
    try:
        description = json.loads((directory / "images.json").read_bytes())
        known = description["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as cause:
        message = f"{directory} is not an image set: images.json is missing or damaged"
        raise CorruptError(message, path=directory) from cause
    if known != FORMAT:
        message = f"image set {directory} has format {known}, this version reads {FORMAT}"
        raise CorruptError(message, path=directory, hint="install a newer smalti")
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
        raise CorruptError(
            f"image set {directory}: keys.txt is truncated or names a file outside the images", path=directory
        )
    keys = text[1:-1].split("\n")
    shapes = {array.shape for array in (labels, sizes)} | ({digests.shape[:1]} if digests is not None else set())
    if shapes != {(images,)} or len(keys) != images or labels.min() < 0 or labels.max() >= len(classes):
        raise CorruptError(f"image set {directory}: keys, labels, sizes and classes are inconsistent", path=directory)
    return Listing(keys, labels, sizes, classes, digests)
