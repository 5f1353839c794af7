"""Inputs on the command line: artifacts of the store, or data that is imported first.

A token set may be a folder outside of the store, which is not copied. An image set may be a folder of images or the word
`digits`, which is indexed; a tokenizer or generator may be a published weight file, local or on the hub, which is imported.
Images given as features are described like the other features of the command.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel

from pipeline.artifact import MANIFEST, Artifact
from pipeline.config import parse_config
from pipeline.draft import Request
from pipeline.errors import SmaltiError, UsageError
from pipeline.externals import Need
from pipeline.outside_tokens import KIND, is_token_folder, open_outside
from pipeline.runner import Options, make, make_request
from pipeline.stage import Inputs, Read, Stage
from pipeline.store import Store
from pipeline.trees import Memory
from stages import stages
from stages.scoring.describe_images import described_as
from stages.scoring.features import KIND as FEATURES
from stages.weights.checkpoint_reader import SUFFIXES
from stages.weights.import_weights import config_of, configs_of
from stages.weights.places import PUBLISHED, HubWeights, place_of

Result = TypeVar("Result")
INSTEAD = (
    "give published weights, as a file or by a name on the hub (rar_b.bin, owner/repository/file), or with --generator or "
    "--tokenizer an artifact"
)
NETWORKS = {"tokenizer", "generator"}
IMAGES = {"images", "image-set"}


Found = dict[str, Artifact | list[Artifact]]
"""Inputs of a stage by name."""


class Unmade(Exception):
    """Data that would have to be put into the store first. how: in words."""

    def __init__(self, text: str, how: str):
        super().__init__(text)
        self.how = how


class Source(NamedTuple):
    """Data outside the store, and the stage that imports it."""

    stage: Stage
    config: BaseModel
    paths: dict[str, Path]


def bring(text: str, wanted: Read, store: Store, options: Options, *, flag: str) -> Artifact:
    """The artifact of an option's value; other data is put into the store first, which is reported.

    flag: the option, for messages.
    """
    place = _hub_place(text, wanted)
    source = (
        _source(text, wanted)
        if place is None
        else _weight_file(Need("", flag, place, "").get(options.progress), wanted)
    )
    if source is None:
        return _find(text, wanted, store)
    made = make(store, source.stage, source.config, Inputs({}), source.paths, options)
    if not made.reused:
        options.progress.say(f"put {text} into the store as {made.artifact.name}")
    return made.artifact


def find_made(text: str, wanted: Read, store: Store, memory: Memory) -> Artifact:
    """The artifact of an option's value; raises Unmade where it is not in the store yet. Makes and downloads nothing."""
    place = _hub_place(text, wanted)
    here = place.find() if place is not None else None
    if place is not None and here is None:
        raise Unmade(text, f"{place.label} would be downloaded and put into the store")
    source = _source(text, wanted) if here is None else _weight_file(here, wanted)
    if source is None:
        return _find(text, wanted, store)
    request = make_request(source.stage, source.config, Inputs({}), source.paths, memory=memory)
    return find_current(request, store, text, f"{text} would be put into the store")


def find_current(request: Request, store: Store, text: str, how: str) -> Artifact:
    """The artifact of a request; raises Unmade(text, how) where it is not in the store yet."""
    if not store.is_current(request):
        raise Unmade(text, how)
    return store.open(request.stage, request.key)


def describe_images(
    declared: Stage, found: Found, store: Store, take: Callable[[Stage, BaseModel, Inputs], Artifact]
) -> Inputs:
    """The inputs, with images given as features described first, with the settings of the other features.

    take: makes or finds an artifact of a stage.  UsageError without other features.
    """
    features = {name: one for name, one in found.items() if FEATURES in declared.reads[name].kinds}
    pattern = next((one for one in features.values() if isinstance(one, Artifact) and one.kind == FEATURES), None)
    for name, one in features.items():
        if isinstance(one, Artifact) and one.kind in IMAGES:
            if pattern is None:
                raise UsageError(
                    f"{declared.name} reads features, but {one.name} holds images, and there are no other features to take settings from",
                    hint="describe the reference first: smalti describe-images --images REFERENCE --classifiers JUDGE",
                )
            found[name] = take(stages()["describe-images"], *described_as(pattern, one, store))
    return Inputs(found)


def holds_tokenizer(text: str) -> bool:
    """Whether an option's value is a weight file that holds a tokenizer; True for one that is not downloaded yet.

    CorruptError (exit code 4) where the file holds no weights.
    """
    place = place_of(text) if not Path(text).exists() else None
    path = Path(text) if place is None else place.find()
    if path is None:
        return text not in PUBLISHED
    return _is_weight_file(path) and any(config.kind == "tokenizer" for config in _understood(path, configs_of))


def _find(text: str, wanted: Read, store: Store) -> Artifact:
    """The existing input: an artifact, or a token set's folder outside of the store."""
    if KIND in wanted.kinds and is_token_folder(Path(text)):
        return open_outside(Path(text))
    return store.find(text)


def _hub_place(text: str, wanted: Read) -> HubWeights | None:
    """A file of the hub, unless a local file has this name."""
    return place_of(text) if NETWORKS & set(wanted.kinds) and not Path(text).exists() else None


def _source(text: str, wanted: Read) -> Source | None:
    """The import of images or weight files that are not artifacts; None for other values."""
    path = Path(text)
    word, _, split = text.partition(":")
    is_set = bool({"image-set", FEATURES} & set(wanted.kinds))
    if is_set and word == "digits":
        return _indexing({"kind": "digits", "split": split or "all"}, {})
    if is_set and path.is_dir() and not (path / MANIFEST).exists():
        return _indexing({"kind": "folder"}, {"images": path})
    if NETWORKS & set(wanted.kinds) and _is_weight_file(path):
        return _weight_file(path, wanted)
    return None


def _is_weight_file(path: Path) -> bool:
    """By its name, if there is no file: then the error is that of a missing weight file."""
    return path.is_file() or path.suffix in SUFFIXES


def _weight_file(path: Path, wanted: Read) -> Source:
    config = _understood(path, partial(config_of, kinds=wanted.kinds))
    return Source(stages()["import-weights"], config, {"weights": path})


def _understood(path: Path, read: Callable[[Path], Result]) -> Result:
    """The result of `read` for a weight file; its errors get a hint about what else could be given."""
    try:
        return read(path)
    except SmaltiError as error:
        error.hint = error.hint or INSTEAD
        raise


def _indexing(source: dict[str, Any], paths: dict[str, Path]) -> Source:
    index = stages()["index"]
    return Source(index, parse_config(index.config, {"source": source}, where=index.name), paths)
