"""Reading small files that a stranger wrote: bounds on size, nesting and shape come before anything is believed."""

from __future__ import annotations

import json
import math
import os
import re
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from smalti.errors import CorruptError

Json = Any
LARGEST_METADATA = 16 * 2**20  # bytes; the class names of ImageNet need 0.03 MiB, the manifest of 20,000 files 3 MiB
DEEPEST_NESTING = 32
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


def damage(path: str | os.PathLike[str], found: str, *, hint: str | None = None) -> CorruptError:
    """The error to raise for a damaged file: `<path> <found>` and what to do."""
    hint = hint or "restore the file from a copy, or make the artifact again"
    return CorruptError(f"{os.fspath(path)} {found}", path=path, hint=hint)


def read_bounded(path: Path, largest: int = LARGEST_METADATA) -> bytes:
    """The bytes of a small file; CorruptError where it is missing or larger than `largest` bytes."""
    try:
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as cause:
        raise damage(path, "is missing") from cause
    if len(data) > largest:
        raise damage(path, f"is larger than {largest} bytes, more than any metadata of ours")
    return data


def parse_json(data: bytes, path: str | os.PathLike[str]) -> Json:
    """JSON from bytes, nested at most 32 deep, without NaN; CorruptError otherwise."""
    brackets = _BRACKET.finditer(_STRING.sub(b"", data))  # read up to the first that is too deep, not all of a forgery
    if any(depth > DEEPEST_NESTING for depth in accumulate(1 if found[0] in b"[{" else -1 for found in brackets)):
        raise damage(path, f"is JSON nested deeper than {DEEPEST_NESTING}")
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as cause:
        raise damage(path, f"is not valid JSON ({cause})") from cause


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def read_json(path: Path) -> Json:
    """A small JSON file, bounded in size and nesting."""
    return parse_json(read_bounded(path), path)


def bytes_of_chunk(shape: tuple[int, ...], itemsize: int, largest: int, path: str) -> int:
    """Size of a chunk before compression; CorruptError where a forged shape makes it larger than `largest`."""
    size = math.prod(shape) * itemsize
    if size > largest:
        raise damage(
            path, f"describes chunks of shape {list(shape)} ({size} bytes), at most {largest} bytes are possible"
        )
    return size


def safe_member(name: Json, listing: Path) -> PurePosixPath:
    """A relative file name out of a list; CorruptError for absolute names, `..`, back slashes and empty parts."""
    is_plain = isinstance(name, str) and 0 < len(name) <= 4096 and not re.search(r"[\\\x00-\x1f]", name)
    if not is_plain or any(part in ("", ".", "..") for part in name.split("/")) or re.match(r"[A-Za-z]:", name):
        raise damage(listing, f"lists the name {str(name)[:80]!r}, which does not stay inside its folder")
    return PurePosixPath(name)
