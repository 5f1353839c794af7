"""File operations of the commit protocol, each with fsync.

`watch` is called with a name before and after every operation that changes the disk: crash tests kill the process
there. Temporary files end in `.partial` and are removed on resume. A write that the system refuses becomes
`CannotWrite` (exit code 73) with the reason in words.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from pipeline.errors import CannotWrite, StorageError

TEMPORARY = ".partial"
REFUSALS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "the operation is not permitted",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "a file of this name exists",
    errno.EISDIR: "a folder of this name exists",
    errno.ENOTEMPTY: "a folder of this name exists",
    errno.ENAMETOOLONG: "the name is too long",
}

ONLY_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # errors that only occur on writing

watch: Callable[[str, Path], None] | None = None


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write `path` atomically: temporary name, flush, fsync, rename."""
    with writing(path) as temporary, temporary.open("wb") as file:
        file.write(data)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to be written by the caller; then fsync and rename it to `path`."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{uuid4().hex[:8]}{TEMPORARY}")  # two writers never share one
    with refusals(path):
        make_folder(path.parent)
        _seen("write", path)
        try:
            yield temporary
            _sync(temporary)
            _seen("rename", path)
            temporary.replace(path)
        except BaseException:  # a partial file must not fill the disk
            temporary.unlink(missing_ok=True)
            raise
        _seen("renamed", path)


class HashingFile:
    """A file that is hashed while it is written sequentially."""

    def __init__(self, raw: BinaryIO):
        self._raw, self._hash, self.size = raw, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self._raw.write(data)
        self._hash.update(data)
        self.size += len(data) if isinstance(data, bytes) else data.nbytes

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def append_line(path: Path, line: bytes) -> None:
    """Append one line to a journal and fsync it."""
    with refusals(path):
        _seen("append", path)
        with path.open("ab") as file:
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        _seen("appended", path)


def make_folder(path: Path) -> None:
    with refusals(path):
        path.mkdir(parents=True, exist_ok=True)


def move(source: Path, target: Path) -> None:
    """Rename a file or folder and fsync the parent folder."""
    with refusals(target):
        _seen("move", target)
        source.rename(target)
        _sync(target.parent)
        _seen("moved", target)


def remove(path: Path) -> None:
    """Remove a file or a folder with its content, if it exists."""
    with refusals(path):
        if path.is_dir() and not path.is_symlink():
            _seen("remove", path)
            shutil.rmtree(path)
        elif path.exists() or path.is_symlink():
            _seen("remove", path)
            path.unlink()


def sync_tree(root: Path) -> None:
    """fsync every folder below `root`, the deepest first (the files in them are synced when they are written)."""
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        _sync(folder)


def hash_file(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turn OSErrors of writing `path` into `CannotWrite` (refused) or `StorageError` (I/O error).

    An error that names another file comes from reading, and is passed on.
    """
    try:
        yield
    except OSError as error:
        if not _concerns(error, path):
            raise
        reason = REFUSALS.get(error.errno or 0)
        if reason is not None:
            hint = "free space or choose another --store"
            raise CannotWrite(f"cannot write {path}: {reason}", path=path, hint=hint) from error
        raise StorageError(f"writing {path} failed: {error.strerror or error}", path=path) from error


def _concerns(error: OSError, path: Path) -> bool:
    """Whether an error names `path`, a file in its folder, a folder above it, or no file."""
    if not isinstance(error.filename, str | os.PathLike):
        return True
    named = Path(error.filename)
    return path.parent in named.parents or named in (path, *path.parents)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _seen(what: str, path: Path) -> None:
    if watch is not None:
        watch(what, path)
