"""Files and their digests: the manifest of an artifact, or SHA256SUMS where a token set has no manifest.

Opening checks the manifest's own digest, every name and size, and the SHA-256 of every zarr.json; full verification
hashes every file. Names are checked before any of them is used as a path. A file may be a link, as in download caches.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from smalti.errors import corrupt_error
from smalti.json_files import Json, check_format, parse_json, read_bounded

MANIFEST_FORMAT = 1
MANIFEST, MANIFEST_DIGEST, SUMS = "manifest.json", "manifest.sha256", "SHA256SUMS"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """A data file: path relative to the folder with `/`, bytes (None if not listed), SHA-256 in hex."""

    path: str
    size: int | None
    sha256: str


@dataclass(frozen=True)
class Listing:
    """The files that a folder must have. source: the file of the list, for error messages."""

    source: Path
    entries: tuple[FileEntry, ...]

    def check_names_and_sizes(self) -> None:
        """CorruptError for a file that is missing or has another size."""
        for entry in self.entries:
            path = self.source.parent / entry.path
            try:
                size = path.stat().st_size if not path.is_dir() else None
            except (FileNotFoundError, NotADirectoryError):
                size = None
            if size is None:
                raise corrupt_error(path, f"is missing, but {self.source.name} lists it")
            if entry.size is not None and size != entry.size:
                raise corrupt_error(path, f"has {size} bytes, expected {entry.size} ({self.source.name})")

    def check_metadata(self, *needed: str) -> None:
        """Hashes every zarr.json; CorruptError where one differs, or where a needed one is not listed."""
        metadata = [entry for entry in self.entries if entry.path.split("/")[-1] == "zarr.json"]
        unlisted = sorted(set(needed) - {entry.path for entry in metadata})
        if unlisted:
            raise corrupt_error(self.source, f"does not list {unlisted[0]}")
        self._check_digests(metadata)

    def check_all(self) -> None:
        """Hashes everything."""
        self._check_digests(self.entries)

    def _check_digests(self, entries: Iterable[FileEntry]) -> None:
        for entry in entries:
            path = self.source.parent / entry.path
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != entry.sha256:
                expected = f"{entry.sha256[:12]}... ({self.source.name})"
                raise corrupt_error(path, f"has SHA-256 {found[:12]}..., expected {expected}")


def read_listing(folder: Path) -> Listing | None:
    """The folder's manifest, else its SHA256SUMS, else None; CorruptError where the list itself is damaged."""
    if (folder / MANIFEST).exists() or (folder / MANIFEST_DIGEST).exists():
        return _read_manifest(folder)
    return _read_sums(folder / SUMS) if (folder / SUMS).exists() else None


def _read_manifest(folder: Path) -> Listing:
    path, digest_path = folder / MANIFEST, folder / MANIFEST_DIGEST
    data = read_bounded(path)
    expected = read_bounded(digest_path, 4096).decode("ascii", "replace").strip()
    if hashlib.sha256(data).hexdigest() != expected:
        raise corrupt_error(path, f"does not match its digest in {digest_path.name}")
    manifest = parse_json(data, path)
    check_format(manifest.get("format") if isinstance(manifest, dict) else None, MANIFEST_FORMAT, path)
    try:
        entries = [FileEntry(entry["path"], entry["size"], entry["sha256"]) for entry in manifest["files"]]
    except (LookupError, TypeError) as cause:
        raise corrupt_error(path, "has no list of files with path, size and sha256") from cause
    return _checked(path, entries)


def _read_sums(path: Path) -> Listing:
    entries = []
    for number, line in enumerate(read_bounded(path).decode("utf-8", "replace").splitlines(), 1):
        digest, mark, name = line[:64], line[64:66], line[66:]
        if mark not in ("  ", " *"):
            raise corrupt_error(path, f"line {number} is not `<SHA-256>  <file>`")
        entries.append(FileEntry(name, None, digest))
    return _checked(path, entries)


def _checked(source: Path, entries: list[FileEntry]) -> Listing:
    """The list; CorruptError for a name outside of the folder, an invalid size or digest, and a duplicate name."""
    for entry in entries:
        _check_name(entry.path, source)
        is_size = entry.size is None or (type(entry.size) is int and entry.size >= 0)
        if not is_size or not isinstance(entry.sha256, str) or not _SHA256.fullmatch(entry.sha256):
            raise corrupt_error(source, f"has no valid size and SHA-256 for {entry.path}")
    if len({entry.path for entry in entries}) != len(entries):
        raise corrupt_error(source, "lists a file twice")
    return Listing(source, tuple(entries))


def _check_name(name: Json, source: Path) -> None:
    """CorruptError for absolute names, `..`, back slashes and empty parts."""
    is_plain = isinstance(name, str) and 0 < len(name) <= 4096 and not re.search(r"[\\\x00-\x1f]|^[A-Za-z]:", name)
    if not is_plain or any(part in ("", ".", "..") for part in name.split("/")):
        raise corrupt_error(source, f"lists the name {str(name)[:80]!r}, which is outside of its folder")
