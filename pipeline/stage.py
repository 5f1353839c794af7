"""Stages: functions with declared config, inputs and output, for the runner and the command line.

    @stage("kmeans", version=1, config=KMeansConfig, reads={"features": read("features")}, writes="codebook", help="...")
    def fit_kmeans(config: KMeansConfig, inputs: Inputs, out: Draft, run: Runtime) -> None: ...

The decorator only attaches the declaration; a table in `stages/__init__.py` names the modules. Importing a stage module
imports no torch: its functions import networks when they run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from pipeline.artifact import Artifact
from pipeline.config import defaults, merge
from pipeline.draft import Draft
from pipeline.errors import CorruptError
from pipeline.progress import Progress
from pipeline.runtime import Runtime
from pipeline.settings import REQUIRED, Setting, settings_of, value_at
from pipeline.trees import Tree

Paths = Mapping[str, Path]


@dataclass(frozen=True)
class Read:
    """One input of a stage: the kinds of artifact that it takes, whether it is optional, whether it is a list."""

    kinds: tuple[str, ...]
    help: str = ""
    optional: bool = False
    many: bool = False


def read(*kinds: str, **options: Any) -> Read:
    return Read(kinds, **options)


class Place(Protocol):
    """The place of a published file, which is downloaded into a cache.

    file: its name.  what: its content in words.  label: its name in messages.  url: for downloads by hand.
    sha256: the expected digest; None: any.  is_keyed: whether keys contain its digest, because its content may change.
    find: the file on this machine, or None, without network.  digest: SHA-256 of a found file.
    check: CorruptError unless a found file has the expected content.  fetch: download it; StorageError without network.
    """

    @property
    def file(self) -> str: ...
    @property
    def what(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def url(self) -> str: ...
    @property
    def sha256(self) -> str | None: ...
    @property
    def is_keyed(self) -> bool: ...
    def find(self) -> Path | None: ...
    def digest(self, path: Path) -> str: ...
    def check(self, path: Path) -> None: ...
    def fetch(self, progress: Progress) -> Path: ...


@dataclass(frozen=True)
class External:
    """Data from outside the store: a description, and a function (config, path) -> content id, or the tree of a folder.

    needed: whether a config needs it (the embedded digits need no folder).
    implies: settings that are implied when it is given; they override defaults, and written settings override them.
    place: the published file that is used when no path is given; None: a path must be given.
    otherwise: how to avoid it, for messages.  usual: the places that `smalti doctor` checks.
    is_file: whether the path is that of one file, such as weights.
    """

    help: str
    identify: Callable[[Any, Path], str | Tree]
    needed: Callable[[Any], bool] = lambda config: True
    implies: Mapping[str, Any] = field(default_factory=dict)
    place: Callable[[Any], Place | None] = lambda config: None
    otherwise: str = ""
    usual: tuple[Place, ...] = ()
    is_file: bool = False


class Inputs:
    """The input artifacts of a stage, by name."""

    def __init__(self, artifacts: Mapping[str, Artifact | list[Artifact]]):
        self._artifacts = dict(artifacts)

    def __getitem__(self, name: str) -> Artifact:
        """The single artifact of this input."""
        artifact = self._artifacts[name]
        assert isinstance(artifact, Artifact), f"{name} is a list: use all()"
        return artifact

    def __contains__(self, name: str) -> bool:
        return name in self._artifacts

    def all(self, name: str) -> list[Artifact]:
        """The artifacts of an input that takes many (none if it is missing)."""
        value = self._artifacts.get(name, [])
        return value if isinstance(value, list) else [value]

    def items(self) -> list[tuple[str, Artifact | list[Artifact]]]:
        return list(self._artifacts.items())

    def flat(self) -> list[Artifact]:
        return [artifact for name in self._artifacts for artifact in self.all(name)]


StageFunction = Callable[[Any, Inputs, Draft, Runtime], None]


@dataclass(frozen=True)
class Proposal:
    """The value of `auto` on the command line: a number for this machine, and the reason in a sentence."""

    value: int
    reason: str


Propose = Callable[[Any, Inputs, str, int], Proposal]
"""(config, inputs, device, processes on this machine) -> proposal."""
NamesOf = Callable[[Inputs], Sequence[str]]
"""inputs -> names of the classes in the order of their numbers; empty if there are none."""


@dataclass(frozen=True)
class Stage:
    """The declaration of a stage and its function."""

    name: str
    version: int
    config: type[BaseModel]
    reads: Mapping[str, Read]
    writes: str | Callable[[Any], str]
    function: StageFunction
    help: str
    example: str
    externals: Mapping[str, External] = field(default_factory=dict)
    trains: bool = False
    """Under torchrun, whether all processes take part; other stages run in process 0."""
    proposes: Mapping[str, Propose] = field(default_factory=dict)
    """Config fields that may be `auto` on the command line. The proposed number goes into the key."""
    names: Mapping[str, NamesOf] = field(default_factory=dict)
    """Dotted config fields that take names of classes on the command line. Their numbers go into the key."""
    digits_defaults: tuple[str, ...] = ()
    """Dotted settings whose default only suits the embedded digits: for other images they must be given."""

    foresees: Callable[[Any, Any], dict[str, Any]] | None = None
    """(config, KnownInputs) -> facts of the output, when a recipe is read; raises for inputs that do not fit (`pipeline.compatibility`)."""
    checks_inputs: bool = False
    """Whether `foresees` is also called with finished inputs before a draft is opened; other stages check what they read."""
    settles: Callable[[Any, Any], Any] | None = None
    """(config, KnownInputs) -> config with the settings that are derived from inputs; see `is_settled`."""

    def settings(self, given: Mapping[str, Any] | None = None, *, all_kinds: bool = False) -> list[Setting]:
        """Every setting with the values `given` (see `pipeline.settings.settings_of`)."""
        standard = {name: value_at(defaults(self.config, {}), name) for name in self.digits_defaults}

        def is_for_digits(setting: Setting) -> bool:
            is_given = value_at(given or {}, setting.name) is not REQUIRED
            return setting.name in standard and not is_given and setting.value == standard[setting.name]

        found = settings_of(self.config, given, all_kinds=all_kinds)
        return [replace(setting, is_for_digits=is_for_digits(setting)) for setting in found]

    def is_settled(self, config: Any) -> bool:
        """Whether no setting is still to be derived from inputs."""
        return self.settles is None or bool(config.is_settled)

    def kind(self, config: Any) -> str:
        """The kind of artifact that it writes."""
        return self.writes if isinstance(self.writes, str) else self.writes(config)


def stage(name: str, **declared: Any) -> Callable[[StageFunction], Stage]:
    """Declare a stage by the fields of `Stage`. Its help is the function's docstring; raise `version` when the same config
    gives other bytes.
    """
    return lambda function: Stage(name=name, function=function, help=function.__doc__ or "", **declared)


def imply(declared: Stage, settings: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The settings, merged over those that are implied by the given external data."""
    found: dict[str, Any] = {}
    for name, external in declared.externals.items():
        if name in given:
            found = merge(found, external.implies)
    return merge(found, settings)


def check_kinds(declared: Stage, inputs: Inputs) -> None:
    """CorruptError (exit code 4) if an artifact of another kind was given."""
    for name, wanted in declared.reads.items():
        for artifact in inputs.all(name):
            if artifact.kind not in wanted.kinds:
                expected = f"{declared.name} reads a {' or '.join(wanted.kinds)} as {name}"
                raise CorruptError(f"{expected}, but {artifact.name} is of kind {artifact.kind}", path=artifact.path)
