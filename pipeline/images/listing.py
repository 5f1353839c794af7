"""The list of an image set's images (keys, labels, sizes, class names), and the digest that identifies it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.trees import Mark

HEADER = b"smalti image list 1\n"
SHOWN = 10  # names in a sentence; whole lists go to log/


class Problem(NamedTuple):
    """A file that should be an image, and why it cannot be used.

    key: its path below the folder, with characters escaped that keys must not have.  reason: a phrase without a path.
    is_fixed: the reason is in the file itself, and not an I/O error of this machine, so that leaving it out gives the same
    set everywhere.
    """

    key: str
    reason: str
    is_fixed: bool = True


class LeftOut(NamedTuple):
    """A file or folder that was ignored, and the rule."""

    key: str
    rule: str


@dataclass(frozen=True)
class Listing:
    """N images in the order of their keys' UTF-8 bytes.

    keys: N distinct names (of a folder: the path below the root, with "/").  labels: int32 (N,), index into `classes`.
    sizes: int64 (N,), bytes of each file.  digests: uint8 (N, 32), SHA-256 of each file, or None if not asked for.
    problems, left_out: other files.  folders: path below the root -> mark of each listed folder.
    """

    keys: list[str]
    labels: NDArray[np.int32]
    sizes: NDArray[np.int64]
    classes: list[str]
    digests: NDArray[np.uint8] | None = None
    problems: tuple[Problem, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    folders: Mapping[str, Mark] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def keep(self, rows: NDArray[np.intp]) -> Listing:
        """The listing of some rows; classes do not change."""
        digests = None if self.digests is None else self.digests[rows]
        return Listing([self.keys[row] for row in rows], self.labels[rows], self.sizes[rows], self.classes, digests)


def digest_listing(listing: Listing) -> str:
    """SHA-256 (hex) of the sorted list (key, size, label, and the file's SHA-256 where it is known), and of the problems.

    The bytes are unambiguous: each line ends in its fixed fields, and a key has no newline.
    """
    digest = hashlib.sha256(HEADER)
    labels, sizes = listing.labels.tolist(), listing.sizes.tolist()
    ends = [""] * len(listing)
    if listing.digests is not None:
        ends = [f"\t{row.tobytes().hex()}" for row in listing.digests]
    rows = zip(listing.keys, sizes, labels, ends, strict=True)
    lines = [f"{key}\t{size}\t{label}{end}\n" for key, size, label, end in rows]
    lines += [f"{key}\t{reason}\n" for key, reason, _ in listing.problems]
    digest.update("".join(lines).encode())
    return digest.hexdigest()


def describe_left_out(left_out: Sequence[LeftOut]) -> str:
    """One sentence on ignored files: counts by rule, with the first names of each."""
    counts = Counter(rule for _, rule in left_out)
    return "; ".join(
        f"{rule}: {count} ({name_some([key for key, its in left_out if its == rule], most=3)})"
        for rule, count in sorted(counts.items())
    )


def name_some(names: Sequence[str], *, most: int = SHOWN, between: str = ", ") -> str:
    """The first names, and the number of others."""
    rest = f"{between}and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + rest


def name_fault(name: str) -> str | None:
    """Why a file or folder name cannot be part of a key, or None."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "has a name that is not UTF-8"
    return "has a line break in its name" if "\n" in name or "\r" in name else None


def escape(name: str) -> str:
    """The name as text of one line in UTF-8."""
    return name.encode(errors="backslashreplace").decode().replace("\n", "\\n").replace("\r", "\\r")
