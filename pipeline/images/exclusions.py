"""A list of images to exclude: a text file with one path below the image folder per line.

Empty lines and lines that begin with # are comments. A folder's path excludes all files below it. The result is the same
as if the files did not exist: a class without other images is not a class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.errors import InputError
from pipeline.images.listing import Listing, Problem, name_some
from smalti.counting import counted

COMMENT = "#"


def read_exclusions(file: Path) -> dict[str, int]:
    """path -> number of its line. InputError if the file cannot be read or is not UTF-8."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as cause:
        raise InputError(f"the list of excluded images {file} cannot be read: {cause.strerror}", path=file) from cause
    except UnicodeDecodeError as cause:
        raise InputError(f"the list of excluded images {file} is not UTF-8", path=file) from cause
    paths = {number: line.removesuffix("\r") for number, line in enumerate(lines, 1)}
    return {
        path.removeprefix("./").rstrip("/"): number
        for number, path in paths.items()
        if path.strip() and not path.startswith(COMMENT)
    }


def identify_exclusions(file: Path) -> str:
    """SHA-256 (hex) of the listed paths, without order and comments."""
    return hashlib.sha256("".join(f"{path}\n" for path in sorted(read_exclusions(file))).encode()).hexdigest()


def exclude(listing: Listing, file: Path) -> Listing:
    """The listing without the images in `file`. InputError if a line matches nothing, or no image is left."""
    lines = read_exclusions(file)
    kept, used = without(listing, lines)
    unused = [f"line {number}: {path!r}" for path, number in lines.items() if path not in used]
    if unused:
        raise InputError(
            f"{len(unused)} of {len(lines)} lines of {file} match nothing below the image folder: {name_some(unused)}",
            path=file,
            hint="give paths below the folder of the class folders, such as n01/a.jpg, and remove the other lines",
        )
    if not len(kept):
        raise InputError(f"{file} excludes all of the {len(listing)} images", path=file)
    return kept


def without(listing: Listing, paths: Collection[str]) -> tuple[Listing, set[str]]:
    """The listing without files and folders of these names, and those of the names that matched."""
    used: set[str] = set()

    def is_kept(key: str) -> bool:
        matching = [path for path in _with_parents(key) if path in paths]
        used.update(matching)
        return not matching

    rows = np.array([row for row, key in enumerate(listing.keys) if is_kept(key)], dtype=np.intp)
    problems = tuple(problem for problem in listing.problems if is_kept(problem.key))
    left_out = tuple(item for item in listing.left_out if is_kept(item.key))
    kept = _without_empty_classes(listing.keep(rows), problems)
    return replace(kept, problems=problems, left_out=left_out), used


def write_exclusions(problems: Sequence[Problem], before: Sequence[str] = ()) -> str:
    """The text of a list that excludes these, with the reason above each, and the paths excluded `before`."""
    head = f"{COMMENT} {counted(len(problems), 'bad image')}, as `smalti index --exclude` reads them\n"
    bad = "".join(f"{COMMENT} {reason}:\n{key}\n" for key, reason, _ in problems)
    return head + bad + "".join([f"{COMMENT} left out before:\n" if before else "", *(f"{path}\n" for path in before)])


def _with_parents(key: str) -> Iterable[str]:
    """The key and every folder above it."""
    yield key
    while "/" in key:
        key = key.rpartition("/")[0]
        yield key


def _without_empty_classes(listing: Listing, problems: Sequence[Problem]) -> Listing:
    troubled = {problem.key.partition("/")[0] for problem in problems}
    filled = set(listing.labels.tolist())
    kept = [label for label, name in enumerate(listing.classes) if label in filled or name in troubled]
    labels = np.searchsorted(kept, listing.labels).astype(np.int32)
    return replace(listing, labels=labels, classes=[listing.classes[label] for label in kept])
