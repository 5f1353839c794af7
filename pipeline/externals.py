"""External data of a step: given files, published files at default places, and their digests for the key.

A published file whose content may change goes into the key by its digest, which is unknown until it is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.errors import CorruptError, InputError, SmaltiError, StorageError
from pipeline.progress import Progress
from pipeline.stage import Place, Stage
from pipeline.trees import Memory, Tree

Paths = Mapping[str, Path]


class DigestUnknown(InputError):
    """A key depends on a file that is not on this machine, and whose digest is not given."""


@dataclass(frozen=True)
class Need:
    """A published file that a step reads, since no file was given. step: its name in a recipe; empty: a single stage."""

    step: str
    external: str
    place: Place
    otherwise: str

    @property
    def option(self) -> str:
        """The option of the running command that gives another file."""
        return option(self.external, self.step)

    @property
    def is_unknown(self) -> bool:
        """Whether the key is unknown until the file is downloaded."""
        return self.place.is_keyed and self.place.sha256 is None and self.place.find() is None

    def as_json(self) -> dict[str, Any]:
        place = self.place
        found = {"external": self.external, "file": place.file, "url": place.url, "sha256": place.sha256}
        return {**found, "option": self.option, "otherwise": self.otherwise}

    def get(self, progress: Progress) -> Path:
        """The checked file, downloaded if needed; hints of errors name the options of the running command."""
        found = self.place.find()
        try:
            return self.check(found or self.place.fetch(progress))
        except (StorageError, InputError) as error:
            if found is not None:
                raise
            raise with_hint(error, _instead([self])) from error

    def check(self, found: Path) -> Path:
        """The file; CorruptError where its content is not the expected one."""
        try:
            self.place.check(found)
        except CorruptError as error:
            raise with_hint(error, f"{error.hint}; or give another: {self.option}") from error
        return found


def needs(declared: Stage, config: BaseModel, paths: Paths, *, step: str = "") -> list[Need]:
    """The published files that a step reads."""
    places = {name: external.place(config) for name, external in declared.externals.items() if name not in paths}
    return [
        Need(step, name, place, declared.externals[name].otherwise)
        for name, place in places.items()
        if place is not None
    ]


def check_caches(wanted: list[Need]) -> None:
    """CorruptError for a cached file whose content is fixed and differs.

    Files of the hub are large, and stored under their digest: they are checked when they are read.
    """
    for need in wanted:
        found = None if need.place.is_keyed else need.place.find()
        if found is not None:
            need.check(found)


def get_all(wanted: list[Need], progress: Progress) -> None:
    """Download and check all of these files; where one cannot be downloaded, the error names the other missing ones too."""
    files = _by_file(wanted)
    for same in files:
        try:
            same[0].get(progress)
        except StorageError as error:
            others = [other for other in files if other is not same and other[0].place.find() is None]
            also = "; ".join(f"{other[0].place.label}: {_options(other)}" for other in others)
            ending = f"; also not on this machine: {also}" if also else ""
            raise with_hint(error, f"{_instead(same)}{ending}") from error


def absent_sentences(absent: list[Need]) -> list[str]:
    """One sentence for each missing file, with the steps that read it."""
    sentences = []
    for same in _by_file(absent):
        steps = ", ".join(need.step for need in same if need.step)
        missing = f"{same[0].place.label} is not on this machine{f' ({steps})' if steps else ''}"
        sentences.append(f"{missing}: it is downloaded before anything is computed; without network, {_instead(same)}")
    return sentences


def _instead(same: list[Need]) -> str:
    """A hint for a file that cannot be downloaded."""
    otherwise = "".join(f"; or {words}" for words in dict.fromkeys(need.otherwise for need in same) if words)
    return f"fetch {same[0].place.url} on a machine with network and give the file: {_options(same)}{otherwise}"


def _options(same: list[Need]) -> str:
    return " ".join(need.option for need in same)


def _by_file(wanted: list[Need]) -> list[list[Need]]:
    """The needs of each file."""
    found: dict[str, list[Need]] = {}
    for need in wanted:
        found.setdefault(need.place.url, []).append(need)
    return list(found.values())


def content_ids(
    declared: Stage, config: BaseModel, paths: Paths, *, step: str = "", memory: Memory | None = None
) -> dict[str, str]:
    """External name -> content id, for the key. DigestUnknown where a file has to be downloaded first.

    memory: remembered content ids of folders; None lists them.  InputError or CorruptError for given data that is missing
    or invalid.
    """
    asked = memory or Memory()
    found = {name: _identify(declared, config, name, path, step, asked) for name, path in paths.items()}
    for need in needs(declared, config, paths, step=step):
        if need.place.is_keyed:
            file = need.place.find()
            if need.is_unknown:
                raise DigestUnknown(f"digest unknown until {need.place.label} is downloaded", path=need.place.url)
            found[need.external] = need.place.sha256 or need.place.digest(Path(str(file)))
    return found


def check_files(declared: Stage, config: BaseModel, paths: Paths, *, step: str = "") -> None:
    """InputError or CorruptError for given files that are missing or invalid."""
    for name, path in paths.items():
        if declared.externals[name].is_file:
            _identify(declared, config, name, path, step, Memory())


def option(external: str, step: str) -> str:
    return f"--set {step}.paths.{external}=FILE" if step else f"--{external} FILE"


def with_hint(error: SmaltiError, hint: str) -> SmaltiError:
    return type(error)(error.message, path=error.path, hint=hint)


def _identify(declared: Stage, config: BaseModel, name: str, path: Path, step: str, memory: Memory) -> str:
    external = declared.externals[name]
    try:
        found = external.identify(config, path)
        return memory.content_id(found) if isinstance(found, Tree) else found
    except (InputError, CorruptError) as error:
        if error.hint is not None or not external.is_file:
            raise
        raise with_hint(error, f"give another: {option(name, step)}") from error
