"""An artifact: an immutable folder with a manifest, and the three levels at which it is checked.

    manifest.json     request, facts, every data file with size and SHA-256; no time, host or path
    manifest.sha256   hex digest of manifest.json
    log/              logs of its making, and the result in one line (figure.txt); outside the manifest

Levels: `open_artifact` (milliseconds: manifest digest, names, sizes, array metadata, shard indexes), `check_data`
(before a stage uses it: crc32c of every shard chunk, SHA-256 of other files) and `verify_artifact` (everything hashed).
"""

from __future__ import annotations

import stat
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline import durable
from pipeline.errors import CorruptError, NewerFormat, StorageError
from pipeline.keys import canonical_bytes, sha256
from smalti.arrays import MappedArray
from smalti.json_files import parse_json, read_json

FORMAT = 1
MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
LOG = "log"
FIGURE = "figure.txt"
REPAIR = "restore it, or make it again: `smalti run RECIPE --force STEP`, or its own command with --force"
MANIFEST_BYTES = 256 * 2**20  # a manifest of a million files is far smaller; larger ones are not parsed
FIELDS = {
    "stage": str,
    "version": int,
    "kind": str,
    "key": str,
    "config": dict,
    "inputs": dict,
    "externals": dict,
    "facts": dict,
    "files": list,
}


@dataclass(frozen=True)
class FileEntry:
    """One data file: path relative to the artifact (POSIX), size in bytes, hex SHA-256."""

    path: str
    size: int
    sha256: str

    @classmethod
    def of(cls, root: Path, name: str) -> FileEntry:
        """The entry of an existing file."""
        return cls(name, (root / name).stat().st_size, durable.hash_file(root / name))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Artifact:
    """A finished artifact whose manifest was checked when it was opened.

    digest: SHA-256 of the manifest.  inputs: name -> {"key", "digest", "stage"}, or a list of these.  files: by path.
    """

    path: Path
    digest: str
    stage: str
    version: int
    kind: str
    key: str
    config: dict[str, Any] = field(repr=False)
    inputs: dict[str, Any] = field(repr=False)
    externals: dict[str, str] = field(repr=False)
    facts: dict[str, Any] = field(repr=False)
    files: dict[str, FileEntry] = field(repr=False)

    @cached_property
    def content(self) -> str:
        """Hex digest of key, files and facts, without text for people (see `is_text`).

        Later steps record it for their inputs, and run again when it changes.
        """
        facts = {name: value for name, value in self.facts.items() if not is_text(name)}
        files = [entry.as_json() for entry in self.files.values()]
        return sha256(canonical_bytes({"key": self.key, "files": files, "facts": facts}))

    @property
    def figure(self) -> str:
        """The result in one line for people; "" if there is none. Older artifacts have it in their facts."""
        try:
            return (self.path / LOG / FIGURE).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return str(self.facts.get("figure", ""))

    @property
    def name(self) -> str:
        """Short name for messages: stage and the first digits of the key."""
        return f"{self.stage}/{self.key[:12]}"

    def file(self, name: str) -> Path:
        """Path of a data file; CorruptError if the manifest does not list it."""
        if name not in self.files:
            raise CorruptError(f"{self.name} has no file {name}", path=self.path)
        return self.path / name


def is_text(fact: str) -> bool:
    """Whether a fact is text for people: `figure` of older artifacts, or `..._on`, the machine of a measurement."""
    return fact == "figure" or fact.endswith("_on")


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The manifest as written to disk: canonical JSON, so that equal content gives equal bytes."""
    return canonical_bytes(manifest) + b"\n"


def open_artifact(path: Path) -> Artifact:
    """Open a finished artifact and check it at level *open*. CorruptError (exit code 4)."""
    artifact = read_manifest(path)
    folders = {path / parent for name in artifact.files for parent in PurePosixPath(name).parents} - {path}
    for folder in sorted(folders):
        if folder.is_symlink():  # the data of an artifact must be inside it
            raise CorruptError(f"{folder} is a link, expected a folder", path=folder)
    for entry in artifact.files.values():
        _check_size(path, entry)
    for name in array_folders(artifact):
        MappedArray(path / name, verify="index")
    return artifact


def check_data(artifact: Artifact) -> None:
    """Check at level *use*: every chunk of arrays by crc32c, every other file by SHA-256."""
    folders = array_folders(artifact)
    for folder in folders:
        MappedArray(artifact.path / folder, verify="crc")
    for entry in artifact.files.values():
        if not any(PurePosixPath(entry.path).is_relative_to(PurePosixPath(folder) / "c") for folder in folders):
            _check_hash(artifact.path, entry)


def verify_artifact(path: Path) -> Artifact:
    """Open an artifact and check it at level *verify*: every file hashed, and no file that is not in the manifest."""
    artifact = open_artifact(path)
    for entry in artifact.files.values():
        _check_hash(path, entry)
    surplus = sorted(set(list_files(path)) - set(artifact.files) - {MANIFEST, DIGEST})
    if surplus:
        found = f"holds files that its manifest does not list: {', '.join(surplus[:5])}"
        raise CorruptError(f"{artifact.name} {found}", path=path)
    return artifact


def read_manifest(path: Path) -> Artifact:
    """Read and check only the manifest: digest, format version, fields, file names."""
    raw, want = _read_small(path / MANIFEST), _read_small(path / DIGEST).decode("ascii", "replace").strip()
    digest = sha256(raw)
    if digest != want:
        found = f"the manifest of {path} does not have the digest that {DIGEST} names"
        raise CorruptError(found, path=path / MANIFEST, hint=REPAIR)
    manifest = parse_json(raw, path / MANIFEST)
    _check_format(manifest, path)
    wrong = [name for name, kind in FIELDS.items() if type(manifest.get(name)) is not kind]
    if wrong:
        raise CorruptError(f"the manifest of {path} lacks a valid field {wrong[0]}", path=path / MANIFEST)
    kinds = {"path": str, "size": int, "sha256": str}
    for entry in manifest["files"]:
        if not isinstance(entry, dict) or {name: type(value) for name, value in entry.items()} != kinds:
            message = f"the manifest of {path} lists a file without path, size and sha256"
            raise CorruptError(message, path=path / MANIFEST)
        check_name(entry["path"], path)
    files = {entry["path"]: FileEntry(**entry) for entry in manifest["files"]}
    return Artifact(path, digest, **{name: manifest[name] for name in FIELDS} | {"files": files})


def _check_format(manifest: Any, path: Path) -> None:
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(found, int) and found > FORMAT:
        needs = f"and needs a newer version of smalti: this one reads formats up to {FORMAT}"
        hint = "upgrade smalti; nothing was altered"
        raise NewerFormat(f"{path} has artifact format {found} {needs}", path=path, hint=hint)
    if found != FORMAT or isinstance(found, bool):
        raise CorruptError(f"{path} has artifact format {found!r}, but the formats are 1 to {FORMAT}", path=path)


def check_name(name: str, path: Path) -> None:
    """CorruptError for a file name outside of its artifact, or of manifest, digest or log."""
    pure = PurePosixPath(name)
    is_plain = bool(name) and not pure.is_absolute() and ".." not in pure.parts and str(pure) == name
    if not is_plain or "\\" in name or "\0" in name or pure.parts[0] in (LOG, MANIFEST, DIGEST):
        raise CorruptError(f"{path} names the file {name!r}, which is not a plain relative path", path=path)


def list_files(root: Path) -> list[str]:
    """Every file below `root` except log/, as sorted POSIX paths."""
    names = (path.relative_to(root) for path in root.rglob("*") if not path.is_dir())
    return sorted(name.as_posix() for name in names if name.parts[0] != LOG)


def array_folders(artifact: Artifact) -> list[str]:
    """Folders of the zarr arrays in this artifact ("." for the artifact itself); their zarr.json is checked by SHA-256."""
    folders = []
    for name, entry in artifact.files.items():
        if PurePosixPath(name).name == "zarr.json":
            _check_hash(artifact.path, entry)
            document = read_json(artifact.path / name)
            if isinstance(document, dict) and document.get("node_type") == "array":
                folders.append(PurePosixPath(name).parent.as_posix())
    return sorted(folders)


def _check_size(root: Path, entry: FileEntry) -> None:
    path = root / entry.path
    try:
        status = path.lstat()
    except OSError as error:
        _check_absent(error, path)
        message = f"{root} lacks the file {entry.path} that its manifest lists"
        raise CorruptError(message, path=path, hint=REPAIR) from error
    if not stat.S_ISREG(status.st_mode) or status.st_size != entry.size:
        message = f"{path} has {status.st_size} bytes, but its manifest says {entry.size}"
        raise CorruptError(message, path=path, hint=REPAIR)


def _check_hash(root: Path, entry: FileEntry) -> None:
    _check_size(root, entry)
    if durable.hash_file(root / entry.path) != entry.sha256:
        message = f"{root / entry.path} does not have the SHA-256 that its manifest lists"
        raise CorruptError(message, path=root / entry.path, hint=REPAIR)


def _read_small(path: Path) -> bytes:
    try:
        if path.stat().st_size > MANIFEST_BYTES:
            raise CorruptError(f"{path} is larger than {MANIFEST_BYTES} bytes, the limit for a manifest", path=path)
        return path.read_bytes()
    except OSError as error:
        _check_absent(error, path)
        raise CorruptError(f"{path.parent} is not an artifact: it has no {path.name}", path=path) from error


def _check_absent(error: OSError, path: Path) -> None:
    """StorageError unless the file is missing: a file that cannot be read need not be damaged."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        raise StorageError(f"{path} cannot be read: {error.strerror or error}", path=path) from error
