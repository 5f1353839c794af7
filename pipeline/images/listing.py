"""The list of an image set's images (keys, labels, sizes, class names), and the digest that identifies it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError

HEADER = b"smalti image list 1\n"


@dataclass(frozen=True)
class Listing:
    """N images in the order of their keys' UTF-8 bytes.

    keys: N distinct names (of a folder: the path below the root, with "/").  labels: int32 (N,), index into `classes`.
    sizes: int64 (N,), bytes of each file.  digests: uint8 (N, 32), SHA-256 of each file, or None if not asked for.
    """

    keys: list[str]
    labels: NDArray[np.int32]
    sizes: NDArray[np.int64]
    classes: list[str]
    digests: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def keep(self, rows: NDArray[np.intp]) -> Listing:
        """The listing of some rows only; the classes stay, so that labels keep their meaning."""
        digests = None if self.digests is None else self.digests[rows]
        return Listing([self.keys[row] for row in rows], self.labels[rows], self.sizes[rows], self.classes, digests)


def digest_listing(listing: Listing) -> str:
    """SHA-256 (hex) of the sorted list (key, size, label, and the file's SHA-256 where it is known).

    Each line ends in its fixed fields and a key holds no newline, so two lists never give the same bytes.
    """
    digest = hashlib.sha256(HEADER)
    labels, sizes = listing.labels.tolist(), listing.sizes.tolist()
    if listing.digests is None:
        lines = [f"{key}\t{size}\t{label}\n" for key, size, label in zip(listing.keys, sizes, labels, strict=True)]
    else:
        hexes = [row.tobytes().hex() for row in listing.digests]
        lines = [
            f"{key}\t{size}\t{label}\t{sha256}\n"
            for key, size, label, sha256 in zip(listing.keys, sizes, labels, hexes, strict=True)
        ]
    digest.update("".join(lines).encode())
    return digest.hexdigest()


def check_name(name: str, path: str) -> None:
    """Refuse a file or folder name that cannot be a key: not UTF-8, or with a line break."""
    try:
        name.encode()
    except UnicodeEncodeError as cause:
        raise InputError(f"the name of {path!r} is not UTF-8", path=ascii(path), hint="rename it") from cause
    if "\n" in name or "\r" in name:
        raise InputError(f"the name of {path!r} has a line break", path=path, hint="rename it")
