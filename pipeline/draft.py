"""A draft: the folder in which one artifact is being made, and from which an interrupted run continues.

Units of work (a shard, a checkpoint) are written file by file, each whole or not at all, and then recorded as one line
of `journal.jsonl`. Whoever opens the draft again keeps the units whose files still verify and sweeps everything else.
Units whose files lie under `scratch/` (checkpoints) help to continue and are no part of the artifact.

`request.json` says which inputs the draft reads, so that nobody takes them for garbage, and what it was called.

Commit: manifest, fsync of files and folders, journal removed, folder renamed. Every moment in between is recoverable.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.artifact import (
    DIGEST,
    FIGURE,
    FORMAT,
    LOG,
    MANIFEST,
    FileEntry,
    check_name,
    list_files,
    manifest_bytes,
    read_manifest,
)
from pipeline.errors import CorruptError
from pipeline.keys import sha256

JOURNAL = "journal.jsonl"
REQUEST = "request.json"
SCRATCH = "scratch"
REPLACED = ".replaced"


@dataclass(frozen=True)
class Request:
    """What is asked of a stage: all that goes into the key, and what the manifest says of it.

    inputs: name -> {"stage", "key", "digest"} with the digest of the content, or a list of these.  former_inputs: the same
    with the digest of the whole manifest, as artifacts recorded it that were made before there was one of the content.
    """

    stage: str
    kind: str
    version: int
    key: str
    config: dict[str, Any]
    inputs: dict[str, Any]
    externals: dict[str, str]
    former_inputs: dict[str, Any] = field(default_factory=dict)

    def is_made_from(self, inputs: dict[str, Any]) -> bool:
        """Whether these inputs of a manifest are the ones asked for, in either form."""
        return inputs in (self.inputs, self.former_inputs or self.inputs)


class Draft:
    """The partial folder of one artifact.

    facts: JSON values that go into the manifest when it is committed.  figure: what came out, in one line for people; it
    goes to the log, so that other words never make later steps run again.
    """

    def __init__(self, path: Path, request: Request):
        self.path = path
        self.request = request
        self.facts: dict[str, Any] = {}
        self.figure = ""
        self._units: dict[str, list[FileEntry]] = {}

    @classmethod
    def open(cls, path: Path, request: Request, *, name: str = "") -> Draft:
        """Open or create the draft folder: keep what the journal proves, sweep the rest (log/ stays).

        Units that were made from other inputs are swept, too.  name: of the artifact for people, such as its ref.
        """
        draft = cls(path, request)
        durable.make_folder(path)
        if not request.is_made_from(read_note(path).get("inputs", request.inputs)):
            durable.remove(path / JOURNAL)
        durable.write_file(path / REQUEST, json.dumps({"inputs": request.inputs, "name": name}).encode())
        draft._units = _verified_units(path)
        kept = {entry.path for files in draft._units.values() for entry in files} | {JOURNAL, REQUEST}
        for name in list_files(path):
            if name not in kept:
                durable.remove(path / name)
        for stray in (path / LOG).rglob(f"*{durable.TEMPORARY}"):
            durable.remove(stray)
        return draft

    @property
    def log(self) -> Path:
        """Folder of logs: kept on resume, outside the manifest."""
        durable.make_folder(self.path / LOG)
        return self.path / LOG

    def is_done(self, unit: str) -> bool:
        return unit in self._units

    def units(self) -> list[str]:
        """Names of the finished units, in the order in which they were recorded."""
        return list(self._units)

    def files(self, unit: str) -> list[Path]:
        return [self.path / entry.path for entry in self._units[unit]]

    def entries(self) -> list[FileEntry]:
        """Every recorded data file with size and SHA-256, sorted by path; checkpoints under scratch/ are left out."""
        entries = (entry for files in self._units.values() for entry in files)
        kept = (entry for entry in entries if not entry.path.startswith(f"{SCRATCH}/"))
        return sorted(kept, key=lambda entry: entry.path)

    def put(self, unit: str, files: Mapping[str, bytes | memoryview]) -> None:
        """Write the files of one unit and record it."""
        self.record(unit, write_files(self.path, files))

    @contextmanager
    def writing(self, unit: str, name: str) -> Iterator[Path]:
        """Yield a temporary path for the one (large) file of a unit; on return it is hashed, renamed and recorded."""
        check_name(name, self.path)
        with durable.writing(self.path / name) as temporary:
            yield temporary
            entry = replace(FileEntry.of(temporary.parent, temporary.name), path=name)
        self.record(unit, [entry])

    @contextmanager
    def streaming(self, unit: str, name: str) -> Iterator[durable.HashingFile]:
        """Yield a file for the one (large) file of a unit, hashed while it is written; on return it is renamed and recorded."""
        check_name(name, self.path)
        with durable.writing(self.path / name) as temporary:
            with temporary.open("wb") as raw:
                file = durable.HashingFile(raw)
                yield file
            entry = FileEntry(name, file.size, file.sha256)
        self.record(unit, [entry])

    def record(self, unit: str, entries: Sequence[FileEntry]) -> None:
        """Journal a unit whose files are already in place (a worker wrote them with `write_files`)."""
        line = {"unit": unit, "files": [entry.as_json() for entry in entries]}
        durable.append_line(self.path / JOURNAL, json.dumps(line, sort_keys=True).encode())
        self._units[unit] = list(entries)

    def drop(self, unit: str) -> None:
        """Forget a unit (an older checkpoint) and remove its files."""
        durable.append_line(self.path / JOURNAL, json.dumps({"dropped": unit}).encode())
        for entry in self._units.pop(unit):
            durable.remove(self.path / entry.path)

    def commit(self, final: Path) -> None:
        """Turn the draft into the artifact `final`."""
        manifest = {
            "format": FORMAT,
            **{name: value for name, value in vars(self.request).items() if name != "former_inputs"},
            "facts": self.facts,
            "files": [entry.as_json() for entry in self.entries()],
        }
        if self.figure:
            durable.write_file(self.log / FIGURE, f"{self.figure}\n".encode())
        raw = manifest_bytes(manifest)
        durable.write_file(self.path / MANIFEST, raw)
        durable.write_file(self.path / DIGEST, sha256(raw).encode() + b"\n")
        finish(self.path, final)


def finish(partial: Path, final: Path) -> None:
    """The last steps of a commit, repeatable: the manifest is written, what is left is to tidy and to rename.

    Tidying takes checkpoints, and what workers left that died in the middle of a file.
    """
    durable.remove(partial / SCRATCH)
    for name in set(list_files(partial)) - {*read_manifest(partial).files, MANIFEST, DIGEST, JOURNAL, REQUEST}:
        durable.remove(partial / name)
    durable.sync_tree(partial)
    durable.remove(partial / JOURNAL)
    durable.remove(partial / REQUEST)
    replaced = final.with_name(f".{final.name}{REPLACED}")
    if final.exists():
        durable.remove(replaced)
        durable.move(final, replaced)
    durable.move(partial, final)
    durable.remove(replaced)


def is_complete(partial: Path, request: Request) -> bool:
    """True if an interrupted commit left a whole artifact of this request in `partial`, ready for `finish`."""
    try:
        artifact = read_manifest(partial)
    except CorruptError:
        return False
    return (
        artifact.key == request.key
        and request.is_made_from(artifact.inputs)
        and all(_is_whole(partial, entry) for entry in artifact.files.values())
    )


def read_note(partial: Path) -> dict[str, Any]:
    """What a draft says of itself: `inputs` and `name`; nothing where it is too old, or just being begun."""
    try:
        return dict(json.loads((partial / REQUEST).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def read_units(partial: Path) -> list[str]:
    """The units that the journal names, in their order; whether they are whole is not looked at."""
    units: dict[str, list[FileEntry]] = {}
    with suppress(OSError):
        for line in (partial / JOURNAL).read_bytes().splitlines():
            _replay(units, line, partial)
    return list(units)


def is_resumable(partial: Path) -> bool:
    """Whether a draft holds work: a unit, or a whole artifact whose commit was interrupted."""
    return bool(read_units(partial)) or (partial / MANIFEST).exists()


def write_files(root: Path, files: Mapping[str, bytes | memoryview]) -> list[FileEntry]:
    """Write files below `root`, each whole or not at all; returns their entries for `Draft.record`."""
    entries = []
    for name, data in files.items():
        check_name(name, root)
        durable.write_file(root / name, data)
        entries.append(FileEntry(name, len(data) if isinstance(data, bytes) else data.nbytes, sha256(bytes(data))))
    return entries


def _verified_units(root: Path) -> dict[str, list[FileEntry]]:
    """The journal's units whose files all verify; an unterminated or unreadable line ends it and is cut off."""
    journal = root / JOURNAL
    if not journal.exists():
        return {}
    units: dict[str, list[FileEntry]] = {}
    kept = b""
    for line in journal.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or not _replay(units, line, root):
            break
        kept += line
    if len(kept) != journal.stat().st_size:
        durable.write_file(journal, kept)
    return {unit: files for unit, files in units.items() if all(_is_whole(root, entry) for entry in files)}


def _replay(units: dict[str, list[FileEntry]], line: bytes, root: Path) -> bool:
    """Apply one line of the journal; False if it is none of ours."""
    try:
        entry = json.loads(line)
        if "dropped" in entry:
            units.pop(entry["dropped"], None)
            return True
        files = [FileEntry(str(file["path"]), int(file["size"]), str(file["sha256"])) for file in entry["files"]]
        for file in files:
            check_name(file.path, root)
        units[str(entry["unit"])] = files
    except (ValueError, TypeError, KeyError, CorruptError):
        return False
    return True


def _is_whole(root: Path, entry: FileEntry) -> bool:
    path = root / entry.path
    return path.is_file() and path.stat().st_size == entry.size and durable.hash_file(path) == entry.sha256
