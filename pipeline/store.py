"""The store: artifacts, drafts, locks and refs in a folder.

<store>/<stage>/<key>/              a finished artifact
<store>/<stage>/.<key>.partial/     its draft while it is made, or after an interruption
<store>/<stage>/.<key>.replaced/    the former artifact while --force replaces it
<store>/<stage>/.<key>.damaged-N/   an artifact that was found damaged, kept for inspection
<store>/<stage>/<key>.lock          held with flock while it is made (the kernel releases it when the holder dies)
<store>/refs/<recipe>/<step>        a small file with "<stage>/<key>"
<store>/trees/<digest>.json         content id of an external folder, and when its folders were modified
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path, PurePosixPath

from pipeline import durable
from pipeline.artifact import LOG, MANIFEST, Artifact, check_data, open_artifact
from pipeline.draft import Draft, Request, finish, is_complete, read_note
from pipeline.errors import CorruptError, InputError, NewerFormat, UsageError
from pipeline.locks import SUFFIX, Say, lock, silent, steady
from pipeline.trees import RECORDS

REFS = "refs"
DAMAGED = ".damaged-"
DAMAGE = "damage.txt"


class Store:
    """A folder of artifacts. Nothing is created before the first write."""

    def __init__(self, root: Path):
        self.root = root.absolute()  # workers may run in another folder

    def path(self, stage: str, key: str) -> Path:
        return self.root / stage / key

    def partial(self, stage: str, key: str) -> Path:
        return self.root / stage / f".{key}.partial"

    def lock_path(self, stage: str, key: str) -> Path:
        return self.root / stage / f"{key}{SUFFIX}"

    def has(self, stage: str, key: str) -> bool:
        return (self.path(stage, key) / MANIFEST).exists()

    def open(self, stage: str, key: str) -> Artifact:
        """Open a finished artifact at level *open*; CorruptError also if the folder holds another one."""
        artifact = open_artifact(self.path(stage, key))
        if (artifact.stage, artifact.key) != (stage, key):
            raise CorruptError(
                f"{artifact.path} holds {artifact.stage}/{artifact.key}: it was moved here",
                path=artifact.path,
                hint="move it back",
            )
        return artifact

    def find(self, name: str) -> Artifact:
        """Open the artifact of a name (see `locate`)."""
        return open_artifact(self.locate(name))

    def locate(self, name: str) -> Path:
        """The folder of an artifact, by its path, a ref (<recipe>/<step>), or a key or its beginning."""
        if (Path(name) / MANIFEST).exists():
            return Path(name).absolute()
        if _is_plain(name) and (self.root / REFS / name).is_file():
            return self.path(*self.read_ref(name))
        matches = [path for path in self.artifacts() if _means(name, path) and (path / MANIFEST).exists()]
        if len(matches) == 1:
            return matches[0]
        what = "names no artifact" if not matches else f"is the beginning of {len(matches)} keys"
        hint = "`smalti status` lists the artifacts"
        raise InputError(f"{name!r} {what} in {self.root}", path=self.root, hint=hint)

    @contextmanager
    def draft(
        self, request: Request, *, wait: bool = True, again: bool = False, name: str = "", say: Say = silent
    ) -> Iterator[Draft | None]:
        """Hold the lock of this key and yield its draft, or None if the artifact was finished meanwhile.

        A damaged artifact is moved aside.  wait: False raises Busy (exit code 75) where another process holds the lock.
        again: make it even if it exists, unless another process made it during the wait.  name: of the draft, while there
        is no ref.  say: prints for which process this one waits, and what was damaged.
        """
        final, partial = self.path(request.stage, request.key), self.partial(request.stage, request.key)
        before = _manifest_identity(final)
        with lock(self.lock_path(request.stage, request.key), wait=wait, say=say):
            found = self.look(request.stage, request.key)
            if isinstance(found, CorruptError):
                self._move_aside(final, found, say)
            if is_complete(partial, request):
                finish(partial, final)
            is_new = _manifest_identity(final) != before
            if (is_new or not again) and self.is_current(request):
                yield None
            else:
                with steady(self.root, say=say):
                    draft = Draft.open(partial, request, name=name)
                yield draft

    def is_current(self, request: Request) -> bool:
        """Whether the artifact exists, opens, and was made from these inputs."""
        found = self.look(request.stage, request.key)
        return isinstance(found, Artifact) and request.is_made_from(found.inputs)

    def look(self, stage: str, key: str) -> Artifact | CorruptError | None:
        """The artifact, the error of opening it, or None if it does not exist. NewerFormat is raised."""
        try:
            return self.open(stage, key) if self.path(stage, key).exists() else None
        except NewerFormat:
            raise
        except CorruptError as error:
            return error

    def set_aside(self, artifact: Artifact, say: Say) -> None:
        """Move an artifact aside whose data is damaged, unless another process has made it again."""
        with lock(self.lock_path(artifact.stage, artifact.key), wait=True, say=say):
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
            durable.write_file(aside / LOG / DAMAGE, f"{damage.message}\n".encode())
        say(f"  damaged: {damage.message}; it was moved to {aside}, and is made again")

    def set_ref(self, name: str, artifact: Artifact) -> None:
        """Set a ref to an artifact; an equal ref is not written again (a finished store may be read-only)."""
        path, line = self.ref_path(name), f"{artifact.stage}/{artifact.key}\n".encode()
        if not path.is_file() or path.read_bytes() != line:
            with steady(self.root):
                durable.write_file(path, line)

    def read_ref(self, name: str) -> tuple[str, str]:
        """(stage, key) of a ref."""
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
        """Folders of all finished artifacts, including damaged ones."""
        return [path for path in self.folders() if not path.name.startswith(".")]

    def drafts(self) -> list[Path]:
        """Partial folders of running and interrupted runs."""
        return [path for path in self.folders() if path.name.endswith(durable.TEMPORARY)]

    def find_drafts(self, name: str) -> list[Path]:
        """Drafts by their name, or by a key or its beginning."""
        drafts = self.drafts()
        return [path for path in drafts if read_note(path).get("name") == name or _means(name, path)]

    def folders(self) -> list[Path]:
        """Folders of artifacts and drafts, and of artifacts that were replaced or moved aside."""
        return [path for path in self.entries() if path.is_dir()]

    def entries(self) -> list[Path]:
        """Everything in the folders of the stages, locks included."""
        if not self.root.is_dir():
            return []
        stages = [path for path in self.root.iterdir() if path.is_dir() and path.name not in (REFS, RECORDS)]
        return sorted(entry for stage in stages for entry in stage.iterdir())

    def ref_path(self, name: str) -> Path:
        """The file of a ref; UsageError for an invalid name."""
        if not _is_plain(name):
            expected = "expected words separated by slashes, such as digits/rar/features"
            raise UsageError(f"{name!r} is not a valid ref name: {expected}")
        return self.root / REFS / name


def _manifest_identity(path: Path) -> tuple[int, int] | None:
    """Inode and change time of the manifest, which differ if an artifact was replaced."""
    try:
        status = (path / MANIFEST).stat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def named_key(path: Path) -> tuple[str, str]:
    """(stage, key) of the folder of an artifact, a draft, or a replaced artifact."""
    return path.parent.name, path.name.removeprefix(".").partition(".")[0]


def _means(name: str, path: Path) -> bool:
    """Whether a name is the key of a folder or its beginning, with or without the name of its stage."""
    stage, slash, start = name.rpartition("/")
    return bool(start) and named_key(path)[1].startswith(start) and (not slash or path.parent.name == stage)


def _is_plain(name: str) -> bool:
    pure = PurePosixPath(name)
    return bool(name) and not pure.is_absolute() and not {"..", "."} & set(name.split("/")) and str(pure) == name
