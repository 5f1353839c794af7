"""The store: where artifacts, drafts, locks and refs lie on a local disk.

<store>/<stage>/<key>/              a finished artifact
<store>/<stage>/.<key>.partial/     its draft while it is made, or after an interruption
<store>/<stage>/.<key>.replaced/    the former artifact while --force swaps it for a new one
<store>/<stage>/.<key>.damaged-N/   an artifact that was found damaged, kept for whoever wants to look at it
<store>/<stage>/<key>.lock          held with flock while it is made (the kernel frees it when the holder dies)
<store>/refs/<recipe>/<step>        a small file that names "<stage>/<key>"
<store>/external/<content id>       where external data (an image folder, a weight file) was last seen
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PurePosixPath

from pipeline import durable
from pipeline.artifact import LOG, MANIFEST, Artifact, check_data, open_artifact, read_manifest
from pipeline.draft import REPLACED, Draft, Request, finish, is_complete
from pipeline.errors import Busy, CannotWrite, CorruptError, InputError, NewerFormat, UsageError

REFS = "refs"
DAMAGED = ".damaged-"

Say = Callable[[str], None]
"""Tells the person in front of the screen one line."""


@dataclass(frozen=True)
class Garbage:
    """Something that no ref reaches: a folder of the store and its size in bytes."""

    path: Path
    bytes: int


class Store:
    """A folder of artifacts. Nothing is created before the first write."""

    def __init__(self, root: Path):
        self.root = root.absolute()  # workers may have started in another folder

    def path(self, stage: str, key: str) -> Path:
        return self.root / stage / key

    def partial(self, stage: str, key: str) -> Path:
        return self.root / stage / f".{key}.partial"

    def has(self, stage: str, key: str) -> bool:
        return (self.path(stage, key) / MANIFEST).exists()

    def open(self, stage: str, key: str) -> Artifact:
        """Open a finished artifact at level *open*; CorruptError also if another one lies in its place."""
        artifact = open_artifact(self.path(stage, key))
        if (artifact.stage, artifact.key) != (stage, key):
            raise CorruptError(
                f"{artifact.path} holds {artifact.stage}/{artifact.key}: somebody moved it here",
                path=artifact.path,
                hint="move it back",
            )
        return artifact

    def find(self, name: str) -> Artifact:
        """Open what `name` means (see `locate`)."""
        return open_artifact(self.locate(name))

    def locate(self, name: str) -> Path:
        """The folder that `name` means: a path of an artifact, a ref (<recipe>/<step>), or a key or its beginning."""
        if (Path(name) / MANIFEST).exists():
            return Path(name).absolute()
        if self._is_ref(name):
            return self.path(*self.read_ref(name))
        stage, slash, start = name.rpartition("/")
        matches = [path for path in self.artifacts() if path.name.startswith(start) and (path / MANIFEST).exists()]
        matches = [path for path in matches if start and (not slash or path.parent.name == stage)]
        if len(matches) == 1:
            return matches[0]
        what = "names no artifact" if not matches else f"is the beginning of {len(matches)} keys"
        raise InputError(
            f"{name!r} {what} in {self.root}", path=self.root, hint="see `smalti status` for what there is"
        )

    @contextmanager
    def draft(
        self, request: Request, *, wait: bool = True, again: bool = False, say: Say = lambda text: None
    ) -> Iterator[Draft | None]:
        """Hold the lock of this key and yield its draft, or None if the artifact was finished meanwhile.

        A damaged artifact in its place is moved aside.  wait: False raises Busy (exit code 75) where another process
        holds the lock.  again: make it even if it is there, unless it is another one than before the wait.
        """
        final, partial = self.path(request.stage, request.key), self.partial(request.stage, request.key)
        before = _manifest_identity(final)
        with lock(final.with_name(f"{request.key}.lock"), wait=wait):
            damage = self.damage(request.stage, request.key)
            if damage is not None:
                self._move_aside(final, damage, say)
            if is_complete(partial, request):
                finish(partial, final)
            is_new = _manifest_identity(final) != before
            if (is_new or not again) and self.is_current(request):
                yield None
            else:
                yield Draft.open(partial, request)

    def is_current(self, request: Request) -> bool:
        """True if the artifact is there, opens, and was made from exactly these inputs."""
        try:
            return self.has(request.stage, request.key) and request.is_made_from(
                self.open(request.stage, request.key).inputs
            )
        except NewerFormat:
            raise
        except CorruptError:
            return False

    def damage(self, stage: str, key: str) -> CorruptError | None:
        """Why the artifact does not open; None if it does, or is not there. One of a newer format raises NewerFormat."""
        if not self.path(stage, key).exists():
            return None
        try:
            self.open(stage, key)
        except NewerFormat:
            raise
        except CorruptError as error:
            return error
        return None

    def set_aside(self, artifact: Artifact, say: Say) -> None:
        """Move an artifact aside whose data is damaged; one that somebody made again meanwhile stays."""
        with lock(artifact.path.with_name(f"{artifact.key}.lock"), wait=True):
            try:
                check_data(self.open(artifact.stage, artifact.key))
            except CorruptError as error:
                self._move_aside(artifact.path, error, say)

    def _move_aside(self, path: Path, damage: CorruptError, say: Say) -> None:
        if not path.exists():
            return
        places = (path.with_name(f".{path.name}{DAMAGED}{number}") for number in count(1))
        aside = next(place for place in places if not place.exists())
        durable.move(path, aside)
        if aside.is_dir():
            durable.write_file(aside / LOG / "damage.txt", f"{damage.message}\n".encode())
        say(f"  damaged: {damage.message}; it was moved to {aside}, and is made again")

    def set_ref(self, name: str, artifact: Artifact) -> None:
        """Point a ref to an artifact; one that points there already is left alone (a finished store may be read-only)."""
        path, line = self.ref_path(name), f"{artifact.stage}/{artifact.key}\n".encode()
        if not path.is_file() or path.read_bytes() != line:
            durable.write_file(path, line)

    def read_ref(self, name: str) -> tuple[str, str]:
        """(stage, key) that a ref names."""
        path = self.ref_path(name)
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
        """Folders of all finished artifacts, damaged ones included."""
        return [path for path in self._stage_entries() if path.is_dir() and not path.name.startswith(".")]

    def drafts(self) -> list[Path]:
        """Partial folders: of runs under way, or interrupted ones that will be continued."""
        return [path for path in self._stage_entries() if path.is_dir() and path.name.endswith(durable.TEMPORARY)]

    def garbage(self) -> list[Garbage]:
        """Artifacts and drafts that no ref reaches through inputs, and what was replaced.

        The draft of a key that a ref names stays: a killed swap may have left the whole artifact in it.
        """
        reached = self._reached()
        folders = [path for path in self._stage_entries() if path.is_dir() and _named_key(path) not in reached]
        replaced = [path for path in self._stage_entries() if path.name.endswith(REPLACED) and path not in folders]
        done = [path for path in replaced if self.has(*_named_key(path))]
        return [Garbage(path, _tree_bytes(path)) for path in sorted([*folders, *done])]

    def sweep(self, garbage: list[Garbage]) -> None:
        """Delete garbage, each under its lock; what somebody is writing stays. Strays of killed processes go too."""
        for item in garbage:
            key = _named_key(item.path)[1]
            gone = item.path.with_name(f".{key}{REPLACED}")  # under another name first: a reader never sees a half
            with suppress(Busy), lock(item.path.with_name(f"{key}.lock"), wait=False):
                if item.path != gone:
                    durable.remove(gone)
                    durable.move(item.path, gone)
                durable.remove(gone)
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
            if (stage, key) in reached:
                continue
            reached.add((stage, key))
            if not self.has(stage, key):
                continue
            for value in read_manifest(self.path(stage, key)).inputs.values():
                todo += [(item["stage"], item["key"]) for item in (value if isinstance(value, list) else [value])]
        return reached

    def _stage_entries(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        stages = [path for path in self.root.iterdir() if path.is_dir() and path.name != REFS]
        return sorted(entry for stage in stages for entry in stage.iterdir())

    def _is_ref(self, name: str) -> bool:
        return _is_plain(name) and (self.root / REFS / name).is_file()

    def ref_path(self, name: str) -> Path:
        """The file of a ref; UsageError for what is no name."""
        if not _is_plain(name):
            raise UsageError(
                f"{name!r} is no ref name: expected words separated by slashes, such as digits/rar/features"
            )
        return self.root / REFS / name


@contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold `path` with flock; the file is removed by its holder, so a waiter checks that it locked the present one."""
    descriptor = _acquire(path, wait=wait)
    _held.add(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        _held.discard(descriptor)
        os.close(descriptor)


_held: set[int] = set()


def _let_go() -> None:
    """A forked process holds no lock of its parent: else the lock would outlive the parent's death."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


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
        with suppress(FileNotFoundError):  # its holder removed it while we waited
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        os.close(descriptor)


def _manifest_identity(path: Path) -> tuple[int, int] | None:
    """Tells one finished artifact folder from another that took its place (inode and change time of the manifest)."""
    try:
        status = (path / MANIFEST).stat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def _named_key(path: Path) -> tuple[str, str]:
    """(stage, key) of an artifact, a draft, or what was replaced."""
    return path.parent.name, path.name.removeprefix(".").partition(".")[0]


def _is_plain(name: str) -> bool:
    pure = PurePosixPath(name)
    return bool(name) and not pure.is_absolute() and not {"..", "."} & set(name.split("/")) and str(pure) == name


def _tree_bytes(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
