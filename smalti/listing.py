"""Files and their digests: the manifest of an artifact, or SHA256SUMS where a token set has no manifest.

Opening checks the manifest's own digest, every name and size, and the SHA-256 of every zarr.json; full verification
hashes every file. Names are checked before any of them is used as a path; a file may be a link, as in download caches,
since its digest decides.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from smalti.attributes import check_format
from smalti.limits import Json, damage, parse_json, read_bounded, safe_member

MANIFEST_FORMAT = 1
MANIFEST, MANIFEST_DIGEST, SUMS = "manifest.json", "manifest.sha256", "SHA256SUMS"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """A data file: path relative to the folder with `/`, bytes (None where the list does not say), SHA-256 in hex."""

    path: str
    size: int | None
    sha256: str


@dataclass(frozen=True)
class Listing:
    """The files that a folder must have. source: the list's own file, for error messages."""

    source: Path
    entries: tuple[FileEntry, ...]

    def check_names_and_sizes(self) -> None:
        """CorruptError for a file that is missing or of another size."""
        for entry in self.entries:
            path = self.source.parent / entry.path
            try:
                size = path.stat().st_size if not path.is_dir() else None
            except (FileNotFoundError, NotADirectoryError):
                size = None
            if size is None:
                raise damage(path, f"is missing, but {self.source.name} lists it")
            if entry.size is not None and size != entry.size:
                raise damage(path, f"has {size} bytes, expected {entry.size} ({self.source.name})")

    def check_metadata(self, *needed: str) -> None:
        """Hashes every zarr.json; CorruptError where one differs, or where a needed one is not listed."""
        metadata = [entry for entry in self.entries if entry.path.split("/")[-1] == "zarr.json"]
        unlisted = sorted(set(needed) - {entry.path for entry in metadata})
        if unlisted:
            raise damage(self.source, f"does not list {unlisted[0]}")
        self._check_digests(metadata)

    def check_all(self) -> None:
        """Hashes everything."""
        self._check_digests(self.entries)

    def _check_digests(self, entries: list[FileEntry] | tuple[FileEntry, ...]) -> None:
        for entry in entries:
            path = self.source.parent / entry.path
            found = file_sha256(path)
            if found != entry.sha256:
                expected = f"{entry.sha256[:12]}... ({self.source.name})"
                raise damage(path, f"has SHA-256 {found[:12]}..., expected {expected}")


def read_listing(folder: Path) -> Listing | None:
    """The folder's manifest, else its SHA256SUMS, else None; CorruptError where the list itself is damaged."""
    if (folder / MANIFEST).exists() or (folder / MANIFEST_DIGEST).exists():
        return _read_manifest(folder)
    return _read_sums(folder / SUMS) if (folder / SUMS).exists() else None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex; CorruptError where it is missing."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as cause:
        raise damage(path, "is missing") from cause


def _read_manifest(folder: Path) -> Listing:
    path, digest_path = folder / MANIFEST, folder / MANIFEST_DIGEST
    data = read_bounded(path)
    words = read_bounded(digest_path, 4096).decode("ascii", "replace").split()
    expected = words[0] if words else ""
    if hashlib.sha256(data).hexdigest() != expected:
        raise damage(path, f"does not match its digest in {digest_path.name}")
    manifest = parse_json(data, path)
    if not isinstance(manifest, dict):
        raise damage(path, "is not a JSON object")
    check_format(manifest.get("format"), MANIFEST_FORMAT, os.fspath(path))
    files = manifest.get("files")
    if not isinstance(files, list):
        raise damage(path, "has no list of files")
    return _listing(path, [_entry(item, path) for item in files])


def _read_sums(path: Path) -> Listing:
    lines = read_bounded(path).decode("utf-8", "replace").splitlines()
    entries = []
    for number, line in enumerate(lines, 1):
        digest, mark, name = line[:64], line[64:66], line[66:]
        if not _SHA256.fullmatch(digest) or mark not in ("  ", " *"):
            raise damage(path, f"line {number} is not `<SHA-256>  <file>`")
        entries.append(FileEntry(str(safe_member(name, path)), None, digest))
    return _listing(path, entries)


def _listing(source: Path, entries: list[FileEntry]) -> Listing:
    if len({entry.path for entry in entries}) != len(entries):
        raise damage(source, "lists a file twice")
    return Listing(source, tuple(entries))


def _entry(item: Json, path: Path) -> FileEntry:
    if not isinstance(item, dict):
        raise damage(path, "has an entry among its files that is no object")
    name, size, sha256 = str(safe_member(item.get("path"), path)), item.get("size"), item.get("sha256")
    if type(size) is not int or size < 0 or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise damage(path, f"has no proper size and SHA-256 for {name}")
    return FileEntry(name, size, sha256)
