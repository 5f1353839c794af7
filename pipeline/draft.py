"""A draft: the folder in which one artifact is being made, and from which an interrupted run continues.

Files of a unit of work (a shard, a checkpoint) are written atomically one by one, and the unit is recorded as one line of
`journal.jsonl`. When the draft is opened again, units whose files match the journal are kept and other files are removed.
Units with files under `scratch/` (checkpoints) are not part of the artifact.
`request.json` holds the inputs of the draft, which garbage collection keeps, and its name.
Commit: manifest, fsync of files and folders, journal removed, folder renamed. A commit can be resumed at every point.
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
    """A request to a stage: the fields of the key and of the manifest.

    inputs: name -> {"stage", "key", "digest"} with the digest of the content, or a list of these.  former_inputs: the same
    with the digest of the whole manifest, as in older artifacts.
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
        """Whether these inputs of a manifest are those of this request, in either form."""
        return inputs in (self.inputs, self.former_inputs or self.inputs)


class Draft:
    """The partial folder of one artifact.

    facts: JSON values for the manifest.  figure: the result in one line for people; it goes to the log, so that its
    wording does not make later steps run again.
    """

    def __init__(self, path: Path, request: Request):
        self.path = path
        self.request = request
        self.facts: dict[str, Any] = {}
        self.figure = ""
        self._units: dict[str, list[FileEntry]] = {}

    @classmethod
    def open(cls, path: Path, request: Request, *, name: str = "") -> Draft:
        """Open or create the draft folder: keep verified units and log/, remove other files.

        Units that were made from other inputs are removed, too.  name: of the artifact for people, such as its ref.
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
        """Every recorded data file, sorted by path, without checkpoints under scratch/."""
        entries = (entry for files in self._units.values() for entry in files)
        kept = (entry for entry in entries if not entry.path.startswith(f"{SCRATCH}/"))
        return sorted(kept, key=lambda entry: entry.path)

    def put(self, unit: str, files: Mapping[str, bytes | memoryview]) -> None:
        """Write the files of one unit and record it."""
        self.record(unit, write_files(self.path, files))

    @contextmanager
    def writing(self, unit: str, name: str) -> Iterator[Path]:
        """Yield a temporary path for the only (large) file of a unit; then it is hashed, renamed and recorded."""
        check_name(name, self.path)
        with durable.writing(self.path / name) as temporary:
            yield temporary
            entry = replace(FileEntry.of(temporary.parent, temporary.name), path=name)
        self.record(unit, [entry])

    @contextmanager
    def streaming(self, unit: str, name: str) -> Iterator[durable.HashingFile]:
        """Yield an open file for the only (large) file of a unit, hashed while it is written; then it is renamed and recorded."""
        check_name(name, self.path)
        with durable.writing(self.path / name) as temporary:
            with temporary.open("wb") as raw:
                file = durable.HashingFile(raw)
                yield file
            entry = FileEntry(name, file.size, file.sha256)
        self.record(unit, [entry])

    def record(self, unit: str, entries: Sequence[FileEntry]) -> None:
        """Add a unit to the journal whose files were written by `write_files`, by a worker."""
        line = {"unit": unit, "files": [entry.as_json() for entry in entries]}
        durable.append_line(self.path / JOURNAL, json.dumps(line, sort_keys=True).encode())
        self._units[unit] = list(entries)

    def drop(self, unit: str) -> None:
        """Remove a unit (an older checkpoint) from the journal, and its files."""
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
    """The last steps of a commit, after the manifest is written; they can be repeated.

    Checkpoints and temporary files of killed workers are removed, and the folder is renamed.
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
    """Whether an interrupted commit left a complete artifact of this request in `partial`, ready for `finish`."""
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
    """`inputs` and `name` of a draft; empty for drafts of older versions, and for one that is just being created."""
    try:
        return dict(json.loads((partial / REQUEST).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def read_units(partial: Path) -> list[str]:
    """The units in the journal, in their order; their files are not checked."""
    units: dict[str, list[FileEntry]] = {}
    with suppress(OSError):
        for line in (partial / JOURNAL).read_bytes().splitlines():
            _replay(units, line, partial)
    return list(units)


def is_resumable(partial: Path) -> bool:
    """Whether a draft holds a unit, or a complete artifact whose commit was interrupted."""
    return bool(read_units(partial)) or (partial / MANIFEST).exists()


def write_files(root: Path, files: Mapping[str, bytes | memoryview]) -> list[FileEntry]:
    """Write files below `root`, each atomically; returns their entries for `Draft.record`."""
    entries = []
    for name, data in files.items():
        check_name(name, root)
        durable.write_file(root / name, data)
        entries.append(FileEntry(name, len(data) if isinstance(data, bytes) else data.nbytes, sha256(bytes(data))))
    return entries


def _verified_units(root: Path) -> dict[str, list[FileEntry]]:
    """The journal's units whose files all verify; the journal is truncated at an incomplete or invalid line."""
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
    """Apply one line of the journal; False if it is not valid."""
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
