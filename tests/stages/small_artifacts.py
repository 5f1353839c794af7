"""Tiny artifacts for the tests of later stages, written by hand: networks with random weights, token sets, images."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.classifiers.config import BUILDERS as CLASSIFIERS
from models.classifiers.config import ConvolutionalClassifierConfig
from models.generators.config import CodeShape, RarConfig
from models.generators.generator import build_generator
from models.registry import build
from models.tokenizer import Tokenizer
from models.tokenizer_config import TokenizerConfig
from pipeline import durable
from pipeline.artifact import Artifact
from pipeline.draft import Draft, Request
from pipeline.keys import config_value, sha256
from pipeline.store import Store
from smalti.arrays import ArraySpec, encode_shard, group_files
from smalti.attributes import TokenAttributes
from stages.codes.token_files import TokenLayout, write_labels_and_cards
from stages.images.image_files import ImageLayout, write_labels_and_metadata
from stages.weights.cards import TokenizerCard
from stages.weights.files import save_weights

CLASSES, CODES, GRID, SIZE = 3, 8, (2, 2), 16


class Killed(BaseException):
    """Stands for a process that dies: nothing catches it."""


class Backwards:
    """A cluster that sends each shard through pickle, as workers get it, and runs the last one first."""

    def map(self, function: Callable[[int], Any], numbers: Iterable[int], **where: Any) -> Iterator[Any]:
        for number in reversed(list(numbers)):
            yield number, pickle.loads(pickle.dumps(function))(number)


def made(store: Store, kind: str, write: Callable[[Draft], None], *, name: str = "", **facts: Any) -> Artifact:
    """An artifact of stage `made-<kind>`, whose files `write` puts, unless one of this name is there."""
    key = sha256(f"{kind} {name}".encode())
    request = Request(f"made-{kind}", kind, 1, key, {}, {}, {})
    with store.draft(request) as draft:
        if draft is not None:
            write(draft)
            draft.facts = facts
            draft.commit(store.path(request.stage, key))
    return store.open(request.stage, key)


def tokenizer_artifact(store: Store, *, seed: int = 0, codes: int = CODES) -> Artifact:
    """A tokenizer of random weights: 16x16 pixels to 2x2 codes."""
    torch.manual_seed(seed)
    config = TokenizerConfig.model_validate(
        {
            "autoencoder": {"kind": "convolutional", "widths": [8, 8, 8], "latent": 4},
            "quantizer": {"kind": "vector", "codes": codes},
        }
    )
    state = Tokenizer(config).state_dict()
    return made(store, "tokenizer", lambda out: save_weights(out, state, config_value(config)), name=f"{seed} {codes}")


def generator_artifact(
    store: Store, tokenizer: Artifact, model: Any = None, *, poison: str = "", **changes: Any
) -> Artifact:
    """A RAR of random weights (or `model` with its network) for the codes of this tokenizer.

    poison: a tensor that is filled with NaN.  changes: other fields of its code space.
    """
    torch.manual_seed(1)
    model = model or RarConfig(width=16, layers=1, heads=2, mlp_width=32)
    network = build_generator(model, CodeShape(codes=CODES, grid=GRID, classes=CLASSES))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    card = {
        "model": config_value(model),
        "space": {
            "codes": CODES,
            "classes": CLASSES,
            "grid": list(GRID),
            "class_names": ["zero", "one", "two"],
            "tokenizer": TokenizerCard.of(tokenizer).identity,
            "resolution": SIZE,
            **changes,
        },
    }
    state = network.state_dict()
    if poison:
        state[poison].fill_(torch.nan)
    return made(store, "generator", lambda out: save_weights(out, state, card), name=f"{model} {poison} {changes}")


def token_artifact(
    store: Store, tokenizer: Artifact, codes_ICT: NDArray[Any], labels_I: NDArray[Any], *, name: str = "", **said: Any
) -> Artifact:
    """A token set of these codes."""
    described = {
        "name": "tiny",
        "n_images": len(codes_ICT),
        "n_crops": codes_ICT.shape[1],
        "grid": GRID,
        "codes": CODES,
        "classes": CLASSES,
        "tokenizer": TokenizerCard.of(tokenizer).identity,
        "resolution": SIZE,
        **said,
    }
    layout = TokenLayout(TokenAttributes(**described), 4, 8, 4)

    def write(out: Draft) -> None:
        for number in range(layout.shards):
            start, stop = layout.shard_range(number)
            out.put(f"shard-{number}", layout.shard(number, codes_ICT[start:stop]))
        write_labels_and_cards(out, layout, labels_I, [f"{row:04d}" for row in range(len(codes_ICT))])

    facts = {"codes": described["codes"], "grid": list(described["grid"]), "classes": described["classes"]}
    return made(store, "token-set", write, name=name, **facts)


def features_artifact(
    store: Store, features_ND: NDArray[Any], labels_I: NDArray[Any], *, name: str = "", **facts: Any
) -> Artifact:
    """Features of hidden states, as describe-tokens writes them: some rows of each image."""
    arrays = {"features": features_ND, "labels": labels_I.astype(np.int32)}
    specs = {
        key: ArraySpec(shape=array.shape, dtype=str(array.dtype), chunk_rows=len(array))
        for key, array in arrays.items()
    }

    def write(out: Draft) -> None:
        for key, array in arrays.items():
            file, data = encode_shard(specs[key], 0, array)
            out.put(key, {f"{key}/{file}": data})
        out.put("metadata", group_files({}, specs))

    views = len(features_ND) // len(labels_I)
    known = {"images": len(labels_I), "views": views, "classes": CLASSES, "layer": 1, "generator": "0" * 64}
    return made(store, "features", write, name=name, **{**known, **facts})


def images_artifact(
    store: Store, images_NHW3: NDArray[np.uint8], labels_N: NDArray[Any], *, name: str = ""
) -> Artifact:
    """An images artifact of these pictures."""
    layout = ImageLayout(len(images_NHW3), *images_NHW3.shape[1:3], len(images_NHW3), len(images_NHW3))

    def write(out: Draft) -> None:
        out.put("shard", layout.shard(0, images_NHW3))
        write_labels_and_metadata(out, layout, labels_N.astype(np.int32), others={})

    return made(store, "images", write, name=name, size=layout.height)


def classifier_artifact(store: Store, *, seed: int = 0, features: int = 8, poison: str = "") -> Artifact:
    """A classifier of random weights for 16x16 pixels. poison: a tensor that is filled with NaN."""
    torch.manual_seed(seed)
    config = ConvolutionalClassifierConfig(image_size=SIZE, classes=CLASSES, widths=(8, 8, 8, 8), features=features)
    state = build(config, CLASSIFIERS).state_dict()
    if poison:
        state[poison].fill_(torch.nan)
    return made(
        store, "classifier", lambda out: save_weights(out, state, config_value(config)), name=f"{seed} {features}"
    )


@contextmanager
def killed_at(call: int) -> Iterator[None]:
    """Raise `Killed` at the n-th operation of the commit protocol."""
    calls = 0

    def count(what: str, path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed

    durable.watch = count
    try:
        yield
    finally:
        durable.watch = None


def digests(artifact: Artifact) -> dict[str, str]:
    """Every data file's SHA-256, and the manifest's."""
    return {"manifest": artifact.digest, **{name: entry.sha256 for name, entry in artifact.files.items()}}
