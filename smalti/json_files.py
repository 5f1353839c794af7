"""Small JSON files from untrusted origins: bounded in size, and with a format version."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from smalti.errors import corrupt_error

Json = Any
LARGEST_METADATA = 16 * 2**20  # bytes; the class names of ImageNet need 0.03 MiB, the manifest of 20,000 files 3 MiB


def read_json(path: Path) -> Json:
    return parse_json(read_bounded(path), path)


def read_bounded(path: Path, largest: int = LARGEST_METADATA) -> bytes:
    """The bytes of a small file; CorruptError where it is missing or larger than `largest` bytes."""
    try:
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as cause:
        raise corrupt_error(path, "is missing") from cause
    if len(data) > largest:
        raise corrupt_error(path, f"is larger than {largest} bytes, the limit for metadata")
    return data


def parse_json(data: bytes, path: str | os.PathLike[str]) -> Json:
    """JSON from bytes; CorruptError where it is not JSON, holds NaN or is nested too deep for Python."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as cause:
        raise corrupt_error(path, f"is not valid JSON ({cause})") from cause


def check_format(found: Json, known: int, path: str | os.PathLike[str]) -> None:
    """CorruptError for a format version that this library cannot read."""
    if type(found) is not int or found < 1:
        raise corrupt_error(path, f"has format version {str(found)[:40]!r}, expected a number from 1 to {known}")
    if found > known:
        hint = "install a newer smalti; nothing was altered"
        message = f"has format version {found} and needs version >= {found} of the format reader"
        raise corrupt_error(path, message, hint=hint)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")
