"""Content ids of folder trees, which a store remembers as long as no folder in them is modified.

Listing a million files takes many seconds, on a network file system minutes; reading the modification times of a thousand
folders does not. A folder's time changes when an entry is added, removed or replaced, but not when a file is overwritten
in place: therefore the size of every file is checked when it is read.

| line of a record | holds |
|---|---|
| 1 | SHA-256 of line 2; a damaged record is ignored |
| 2 | JSON: content id, and path below the tree -> mark of every folder |
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pipeline import durable
from pipeline.errors import CannotWrite

RECORDS = "trees"
FORMAT = "smalti tree 1"
YOUNG_NS = 3_000_000_000
"""Within this time after a modification, another one may leave the folder's time unchanged (FAT: 2 s)."""


class Mark(NamedTuple):
    """The state of a folder, to detect modifications. entries: digest of its entries, if its time was too recent."""

    modified_ns: int
    entries: str


class Look(NamedTuple):
    """The result of listing a tree. folders: path below the tree -> mark; empty: it cannot be remembered."""

    content: str
    folders: Mapping[str, Mark]


@dataclass(frozen=True)
class Tree:
    """A folder tree. rules: other things that the content id depends on.  look: lists the tree."""

    folder: Path
    rules: str
    look: Callable[[], Look]

    @property
    def name(self) -> str:
        """Name of its record, which depends on the path of the folder."""
        place = os.fsencode(self.folder.resolve())
        return hashlib.sha256(b"\0".join([FORMAT.encode(), self.rules.encode(), place])).hexdigest()


@dataclass
class Memory:
    """The remembered content ids of trees. store: None remembers nothing beyond this object.

    rescan: list every tree again, once.
    """

    store: Path | None = None
    rescan: bool = False
    _known: dict[str, str] = field(default_factory=dict)
    _remembered: set[str] = field(default_factory=set)
    _doubted: set[str] = field(default_factory=set)
    _unsaved: dict[str, Look] = field(default_factory=dict)

    def content_id(self, tree: Tree) -> str:
        """The remembered id if no folder was modified, else the result of `tree.look`, whose errors are passed on."""
        name = tree.name
        if name not in self._known:
            found = None if self.rescan or name in self._doubted else self._recall(name, tree.folder)
            if found is None:
                look = tree.look()
                found, self._unsaved[name] = look.content, look
            else:
                self._remembered.add(name)
            self._known[name] = found
            self.save()
        return self._known[name]

    def doubt(self, contents: Collection[str]) -> bool:
        """Forget remembered ids among these, so that their trees are listed next time; whether there were any."""
        names = {name for name in self._remembered if self._known[name] in contents}
        self._remembered -= names
        self._doubted |= names
        for name in names:
            del self._known[name]
        return bool(names)

    def save(self) -> None:
        """Write new ids into the store, if it exists and can be written."""
        if self.store is None or not self.store.is_dir():
            return
        for name, look in self._unsaved.items():
            with suppress(CannotWrite):
                if look.folders:
                    durable.write_file(self._record(name), _encode(look))
                else:
                    durable.remove(self._record(name))
        self._unsaved.clear()

    def _recall(self, name: str, folder: Path) -> str | None:
        with suppress(OSError):
            look = _decode(self._record(name).read_bytes()) if self.store is not None else None
            if look is not None and all(_has(folder / path, before) for path, before in look.folders.items()):
                return look.content
        return None

    def _record(self, name: str) -> Path:
        assert self.store is not None
        return self.store / RECORDS / f"{name}.json"


def mark(folder: str | Path) -> Mark:
    """The mark of a folder, to be read before it is listed. Raises OSError."""
    modified_ns = Path(folder).stat().st_mtime_ns
    is_young = time.time_ns() - modified_ns < YOUNG_NS
    return Mark(modified_ns, digest_entries(folder) if is_young else "")


def digest_entries(folder: str | Path) -> str:
    """SHA-256 (hex) of names, sizes and modification times of the files in a folder, and of the names of its folders."""
    lines = []
    with os.scandir(folder) as entries:
        for entry in entries:
            facts = ""
            with suppress(OSError):  # a broken link has only a name
                status = None if entry.is_dir() else entry.stat()
                facts = "" if status is None else f"{status.st_size} {status.st_mtime_ns}"
            lines.append(b"%s\0%s\0" % (os.fsencode(entry.name), facts.encode()))
    return hashlib.sha256(b"".join(sorted(lines))).hexdigest()


def _has(folder: Path, before: Mark) -> bool:
    is_same = folder.stat().st_mtime_ns == before.modified_ns
    return is_same and (not before.entries or digest_entries(folder) == before.entries)


def _encode(look: Look) -> bytes:
    body = json.dumps({"content": look.content, "folders": look.folders}).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body + b"\n"


def _decode(record: bytes) -> Look | None:
    """None for a damaged record."""
    digest, _, rest = record.partition(b"\n")
    body = rest.removesuffix(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    found = json.loads(body)
    return Look(found["content"], {name: Mark(*values) for name, values in found["folders"].items()})
