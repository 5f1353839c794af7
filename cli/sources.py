"""What a word on the command line means as an input: an artifact of the store, or data that is brought in first.

An image set may be a plain folder or the word `digits`, which is indexed; a tokenizer or generator may be a published
weight file, here or on the hub, which is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from pipeline.artifact import MANIFEST, Artifact
from pipeline.config import parse_config
from pipeline.runner import Options, make, make_request
from pipeline.stage import Inputs, Read, Stage
from pipeline.store import Store
from stages import stages
from stages.foreign import SUFFIXES
from stages.hub import HubWeights, download, place_of
from stages.import_weights import config_of

NETWORKS = {"tokenizer", "generator"}


class Unmade(Exception):
    """Data that would be put into the store first."""


class Source(NamedTuple):
    """Data outside the store, and the step that brings it in."""

    stage: Stage
    config: BaseModel
    paths: dict[str, Path]


def bring(text: str, wanted: Read, store: Store, options: Options) -> Artifact:
    """The artifact that a word means; what is none yet is put into the store first, and said so."""
    place = _hub_place(text, wanted)
    source = _weight_file(download(place, options.progress)) if place is not None else _source(text, wanted)
    if source is None:
        return store.find(text)
    made = make(store, source.stage, source.config, Inputs({}), source.paths, options)
    if not made.reused:
        options.progress.say(f"put {text} into the store as {made.artifact.name}")
    return made.artifact


def find_made(text: str, wanted: Read, store: Store) -> Artifact:
    """The artifact that a word means; raises Unmade where it is not in the store yet. Writes and downloads nothing."""
    if _hub_place(text, wanted) is not None:
        raise Unmade(text)
    source = _source(text, wanted)
    if source is None:
        return store.find(text)
    request = make_request(source.stage, source.config, Inputs({}), source.paths)
    if not store.is_current(request):
        raise Unmade(text)
    return store.open(request.stage, request.key)


def _hub_place(text: str, wanted: Read) -> HubWeights | None:
    """A file of the hub, unless there is one of this name here."""
    return place_of(text) if NETWORKS & set(wanted.kinds) and not Path(text).exists() else None


def _source(text: str, wanted: Read) -> Source | None:
    """What is to be done first for images or weight files that are no artifact; None for everything else."""
    path = Path(text)
    word, _, split = text.partition(":")
    if "image-set" in wanted.kinds and word == "digits":
        return _indexing({"kind": "digits", "split": split or "all"}, {})
    if "image-set" in wanted.kinds and path.is_dir() and not (path / MANIFEST).exists():
        return _indexing({"kind": "folder"}, {"images": path})
    if NETWORKS & set(wanted.kinds) and path.suffix in SUFFIXES and path.is_file():
        return _weight_file(path)
    return None


def _weight_file(path: Path) -> Source:
    return Source(stages()["import-weights"], config_of(path), {"weights": path})


def _indexing(source: dict[str, Any], paths: dict[str, Path]) -> Source:
    index = stages()["index"]
    return Source(index, parse_config(index.config, {"source": source}, where=index.name), paths)
