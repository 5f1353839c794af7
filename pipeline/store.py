"""The store: where artifacts, drafts, locks and refs lie on a local disk.

<store>/<stage>/<key>/              a finished artifact
<store>/<stage>/.<key>.partial/     its draft while it is made, or after an interruption
<store>/<stage>/<key>.lock          held with flock while it is made (the kernel frees it when the holder dies)
<store>/refs/<recipe>/<step>        a small file that names "<stage>/<key>"
<store>/external/<content id>       where external data (an image folder, a weight file) was last seen
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline import durable
from pipeline.artifact import MANIFEST, Artifact, open_artifact, read_manifest
from pipeline.draft import Draft, Request, finish, is_complete
from pipeline.errors import Busy, CannotWrite, CorruptError, InputError, UsageError

REFS = "refs"


@dataclass(frozen=True)
class Garbage:
    """Something that no ref reaches: a folder of the store and its size in bytes."""

    path: Path
    bytes: int


class Store:
    """A folder of artifacts. Nothing is created before the first write."""

    def __init__(self, root: Path):
        self.root = root

    def path(self, stage: str, key: str) -> Path:
        return self.root / stage / key

    def partial(self, stage: str, key: str) -> Path:
        return self.root / stage / f".{key}.partial"

    def has(self, stage: str, key: str) -> bool:
        return (self.path(stage, key) / MANIFEST).exists()

    def open(self, stage: str, key: str) -> Artifact:
        """Open a finished artifact at level *open*."""
        return open_artifact(self.path(stage, key))

    def find(self, name: str) -> Artifact:
        """Open what `name` means (see `locate`)."""
        return open_artifact(self.locate(name))

    def locate(self, name: str) -> Path:
        """The folder that `name` means: a path of an artifact, a ref (<recipe>/<step>), or a key or its beginning."""
        if (Path(name) / MANIFEST).exists():
            return Path(name).absolute()
        if self._is_ref(name):
            return self.path(*self.read_ref(name))
        matches = [path for path in self._folders() if path.name.startswith(name.rpartition("/")[2])] if name else []
        matches = [path for path in matches if "/" not in name or path.parent.name == name.rpartition("/")[0]]
        if len(matches) == 1:
            return matches[0]
        what = "names no artifact" if not matches else f"is the beginning of {len(matches)} keys"
        raise InputError(
            f"{name!r} {what} in {self.root}", path=self.root, hint="see `smalti status` for what there is"
        )

    @contextmanager
    def draft(self, request: Request, *, wait: bool = True) -> Iterator[Draft | None]:
        """Hold the lock of this key and yield its draft, or None if another process finished it meanwhile.

        wait: False raises Busy (exit code 75) where another process holds the lock.
        """
        final, partial = self.path(request.stage, request.key), self.partial(request.stage, request.key)
        before = _manifest_identity(final)
        with lock(final.with_name(f"{request.key}.lock"), wait=wait):
            if is_complete(partial, request):
                finish(partial, final)
            if final.exists() and _manifest_identity(final) != before:
                yield None
            else:
                yield Draft.open(partial, request)

    def set_ref(self, name: str, artifact: Artifact) -> None:
        durable.write_file(self._ref_path(name), f"{artifact.stage}/{artifact.key}\n".encode())

    def read_ref(self, name: str) -> tuple[str, str]:
        """(stage, key) that a ref names."""
        path = self._ref_path(name)
        try:
            stage, _, key = path.read_text().strip().partition("/")
        except OSError as error:
            raise InputError(f"there is no ref {name} in {self.root}", path=path) from error
        if not stage or len(key) != 64:
            raise CorruptError(f"the ref {path} does not name <stage>/<key>", path=path)
        return stage, key

    def refs(self) -> dict[str, tuple[str, str]]:
        """Every ref: name -> (stage, key)."""
        root = self.root / REFS
        paths = sorted(path for path in root.rglob("*") if path.is_file() and not path.name.endswith(durable.TEMPORARY))
        names = [path.relative_to(root).as_posix() for path in paths]
        return {name: self.read_ref(name) for name in names}

    def artifacts(self) -> list[Path]:
        """Folders of all finished artifacts."""
        return self._folders()

    def drafts(self) -> list[Path]:
        """Partial folders: of runs under way, or interrupted ones that will be continued."""
        return [path for path in self._stage_entries() if path.name.startswith(".") and path.is_dir()]

    def garbage(self) -> list[Garbage]:
        """Artifacts and drafts that no ref reaches through inputs."""
        reached = self._reached()
        folders = [path for path in self._folders() if (path.parent.name, path.name) not in reached]
        return [Garbage(path, _tree_bytes(path)) for path in [*folders, *self.drafts()]]

    def sweep(self, garbage: list[Garbage]) -> None:
        """Delete garbage, each under its lock; what somebody is writing stays. Strays of killed processes go too."""
        for item in garbage:
            key = item.path.name.removeprefix(".").split(".")[0]
            try:
                with lock(item.path.with_name(f"{key}.lock"), wait=False):
                    durable.remove(item.path)
            except Busy:
                continue
        for entry in self._stage_entries():
            if entry.suffix == ".lock":
                with suppress(Busy), lock(entry, wait=False):
                    pass  # whoever held it is dead: releasing removes it
        for stray in (self.root / REFS).rglob(f"*{durable.TEMPORARY}"):
            durable.remove(stray)

    def _reached(self) -> set[tuple[str, str]]:
        reached: set[tuple[str, str]] = set()
        todo = list(self.refs().values())
        while todo:
            stage, key = todo.pop()
            if (stage, key) in reached or not self.has(stage, key):
                continue
            reached.add((stage, key))
            for value in read_manifest(self.path(stage, key)).inputs.values():
                todo += [(item["stage"], item["key"]) for item in (value if isinstance(value, list) else [value])]
        return reached

    def _folders(self) -> list[Path]:
        return [path for path in self._stage_entries() if not path.name.startswith(".") and (path / MANIFEST).exists()]

    def _stage_entries(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        stages = [path for path in self.root.iterdir() if path.is_dir() and path.name != REFS]
        return sorted(entry for stage in stages for entry in stage.iterdir())

    def _is_ref(self, name: str) -> bool:
        return _is_plain(name) and (self.root / REFS / name).is_file()

    def _ref_path(self, name: str) -> Path:
        if not _is_plain(name):
            raise UsageError(
                f"{name!r} is no ref name: expected words separated by slashes, such as digits/rar/features"
            )
        return self.root / REFS / name


@contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold `path` with flock; the file is removed by its holder, so a waiter checks that it locked the present one."""
    descriptor = _acquire(path, wait=wait)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, *, wait: bool) -> int:
    while True:
        durable.make_folder(path.parent)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CannotWrite(f"cannot create the lock {path}: {error.strerror}", path=path) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            os.close(descriptor)
            raise Busy(
                f"another process is making {path.stem[:12]} ({path.parent.name})",
                path=path,
                hint="wait for it, or run without --no-wait",
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            return descriptor
        os.close(descriptor)


def _manifest_identity(path: Path) -> tuple[int, int] | None:
    """Tells one finished artifact folder from another that took its place (inode and change time of the manifest)."""
    try:
        status = (path / MANIFEST).stat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def _is_plain(name: str) -> bool:
    pure = PurePosixPath(name)
    return bool(name) and not pure.is_absolute() and not {"..", "."} & set(name.split("/")) and str(pure) == name


def _tree_bytes(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
