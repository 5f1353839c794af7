"""What a stage is: a function with declared config, inputs and output, known to the runner and to the command line.

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
    """One input of a stage: the kinds of artifact that fit, whether it may be left out, whether it is a list."""

    kinds: tuple[str, ...]
    help: str = ""
    optional: bool = False
    many: bool = False


def read(*kinds: str, **options: Any) -> Read:
    return Read(kinds, **options)


class Place(Protocol):
    """Where a file lies that others published, and how it gets onto this machine: into a cache, once.

    file: its name.  what: what it holds, in words.  label: how sentences call it.  url: where a person may fetch it.
    sha256: the digest that it must have; None: any.  is_keyed: whether keys need its digest, because it may have another
    content one day.  find: the file on this machine, if it is there; asks no server.  digest: SHA-256 of a found file.
    check: CorruptError unless a found file is what it should be.  fetch: download it; StorageError where no server
    answers within seconds.
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
    """Data from outside the store: what it is, and a function (config, path) -> content id, or a tree that has one.

    needed: tells from the config whether this stage needs it at all (the embedded digits need no folder).
    implies: settings that giving it stands for, over the defaults and under what is set.
    place: where the config says it comes from when no path is given; None for data that is always given.
    otherwise: how to do without it, for sentences.  usual: the places that `smalti doctor` looks at.
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
    """The artifacts that a stage was given, by name."""

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
        """The artifacts of an input that takes many (none if it was left out)."""
        value = self._artifacts.get(name, [])
        return value if isinstance(value, list) else [value]

    def items(self) -> list[tuple[str, Artifact | list[Artifact]]]:
        return list(self._artifacts.items())

    def flat(self) -> list[Artifact]:
        return [artifact for name in self._artifacts for artifact in self.all(name)]


StageFunction = Callable[[Any, Inputs, Draft, Runtime], None]


@dataclass(frozen=True)
class Proposal:
    """What the command line puts in the place of `auto`: a number that suits this machine, and a sentence of why."""

    value: int
    reason: str


Propose = Callable[[Any, Inputs, str, int], Proposal]
"""(config, inputs, device, processes on this machine) -> proposal."""
NamesOf = Callable[[Inputs], Sequence[str]]
"""inputs -> names of the classes, by their numbers; none where they have none."""


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
    """Under torchrun, every process takes part in the work; of other stages the first one does it all."""
    proposes: Mapping[str, Propose] = field(default_factory=dict)
    """Config fields that may be `auto` on the command line. What is proposed goes into the key like any other number."""
    names: Mapping[str, NamesOf] = field(default_factory=dict)
    """Dotted config fields that may name classes on the command line. Their numbers go into the key."""
    digits_defaults: tuple[str, ...] = ()
    """Dotted settings whose default suits the embedded digits alone: other images need them to be given."""

    foresees: Callable[[Any, Any], dict[str, Any]] | None = None
    """(config, KnownInputs) -> facts of the output; refuses what does not fit together (`pipeline.compatibility`), when a recipe is
    read."""
    checks_inputs: bool = False
    """Whether `foresees` is asked of finished inputs, too, before a draft is opened; other stages check what they read."""
    settles: Callable[[Any, Any], Any] | None = None
    """The config with what the inputs decide of it; its `is_settled` says whether they told everything already."""

    def settings(self, given: Mapping[str, Any] | None = None, *, all_kinds: bool = False) -> list[Setting]:
        """Every setting when `given` is asked for (see `pipeline.settings.settings_of`)."""
        standard = {name: value_at(defaults(self.config, {}), name) for name in self.digits_defaults}

        def is_for_digits(setting: Setting) -> bool:
            is_given = value_at(given or {}, setting.name) is not REQUIRED
            return setting.name in standard and not is_given and setting.value == standard[setting.name]

        found = settings_of(self.config, given, all_kinds=all_kinds)
        return [replace(setting, is_for_digits=is_for_digits(setting)) for setting in found]

    def is_settled(self, config: Any) -> bool:
        """Whether nothing of the config is left to inputs that are not made yet."""
        return self.settles is None or bool(config.is_settled)

    def kind(self, config: Any) -> str:
        """The kind of artifact that it writes; with most stages it is always the same."""
        return self.writes if isinstance(self.writes, str) else self.writes(config)


def stage(name: str, **declared: Any) -> Callable[[StageFunction], Stage]:
    """Declare a stage by the fields of `Stage`. Its help is the function's docstring; raise `version` when the same config
    gives other bytes.
    """
    return lambda function: Stage(name=name, function=function, help=function.__doc__ or "", **declared)


def imply(declared: Stage, settings: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The settings, laid over those that the given external data stands for."""
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
