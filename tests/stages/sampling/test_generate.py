"""Sampling and decoding at a time gives what one after the other gives, to the byte."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from PIL import Image

import stages.sampling.generate
from models.sampling.config import ConstantGuidance, SamplingConfig
from pipeline.artifact import Artifact
from pipeline.cluster import connect
from pipeline.errors import CorruptError, NumericError, UsageError
from pipeline.runner import Options, make
from pipeline.stage import Inputs
from pipeline.store import Store
from smalti.tokens import open_tokens
from stages.images.image_files import open_pictures
from stages.sampling.config import DecodeConfig, GenerateConfig, SampleConfig
from stages.sampling.decode import decode_tokens
from stages.sampling.generate import generate_images
from stages.sampling.sample import choose_labels, draw_samples
from tests.stages.conformance import zarr_members
from tests.stages.small_artifacts import (
    CODES,
    Killed,
    digests,
    generator_artifact,
    killed_at,
    token_artifact,
    tokenizer_artifact,
)

CUT = {"shard_images": 8, "chunk_images": 4}
SAMPLED: dict[str, Any] = {
    "images": 21,
    "rows_per_pass": 4,
    "seed": 5,
    "sampling": SamplingConfig(guidance=ConstantGuidance(scale=(3.0,))),
}
SHOWN = {"grid_images": 12, "npz": True}
CONFIG = GenerateConfig(**SAMPLED, **SHOWN, **CUT, rows_per_decoding=3)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("origin"))


@pytest.fixture(scope="module")
def tokenizer(origin: Store) -> Artifact:
    return tokenizer_artifact(origin)


@pytest.fixture(scope="module")
def generator(origin: Store, tokenizer: Artifact) -> Artifact:
    return generator_artifact(origin, tokenizer)


@pytest.fixture(scope="module")
def images(origin: Store, generator: Artifact, tokenizer: Artifact) -> Artifact:
    return run(origin, generator, tokenizer)


def run(
    store: Store,
    generator: Artifact,
    tokenizer: Artifact,
    config: GenerateConfig = CONFIG,
    options: Options | None = None,
    **more: Artifact,
) -> Artifact:
    inputs = Inputs({"generator": generator, "tokenizer": tokenizer, **more})
    return make(store, generate_images, config, inputs, {}, options or Options()).artifact


@pytest.mark.parametrize(("rows", "together"), [(4, 3), (3, 4), (8, 8), (5, 21), (21, 1)])
def test_the_images_of_sampling_and_then_decoding(
    generator: Artifact, tokenizer: Artifact, tmp_path: Path, rows: int, together: int
) -> None:
    """Whichever pass is the larger one, within a shard and at its end."""
    store, sampled = Store(tmp_path), {**SAMPLED, "rows_per_pass": rows}
    codes = make(store, draw_samples, SampleConfig(**sampled, **CUT), Inputs({"generator": generator}), {}, Options())
    inputs = Inputs({"tokens": codes.artifact, "tokenizer": tokenizer})
    config = DecodeConfig(**SHOWN, **CUT, rows_per_pass=together)
    after = make(store, decode_tokens, config, inputs, {}, Options()).artifact
    at_once = run(store, generator, tokenizer, GenerateConfig(**sampled, **SHOWN, **CUT, rows_per_decoding=together))
    data = [name for name in after.files if name.startswith(("images/", "labels/")) or name == "samples.npz"]
    assert len(data) == 7
    for name in data:
        assert at_once.file(name).read_bytes() == after.file(name).read_bytes(), name
    grids = [np.array(Image.open(artifact.file("grid.png"))) for artifact in (at_once, after)]
    assert (grids[0] == grids[1]).all()
    kept = zarr.open_group(at_once.path, mode="r")["tokens"][:]
    assert (kept == open_tokens(codes.artifact.path).tokens.read()).all()
    assert zarr_members(at_once) == ["images", "labels", "tokens"]
    assert zarr_members(codes.artifact) == ["keys", "labels", "tokens"]


def test_an_images_artifact_like_any_other(images: Artifact) -> None:
    found = open_pictures(images, size=16)
    assert found.labels_I.tolist() == [row % 3 for row in range(21)]
    assert found.class_names == ["zero", "one", "two"]
    assert images.figure == "21 samples of 3 classes, 16x16"
    assert '"seed":5' in Image.open(images.path / "grid.png").text["sampled"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("call", [1, 5, 9, 14, 20, 30, 41])
def test_interrupted_and_continued_gives_the_same_bytes(
    call: int, images: Artifact, generator: Artifact, tokenizer: Artifact, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    with pytest.raises(Killed), killed_at(call):
        run(store, generator, tokenizer)
    assert digests(run(store, generator, tokenizer)) == digests(images)


def test_two_workers_give_the_same_bytes(
    images: Artifact, generator: Artifact, tokenizer: Artifact, tmp_path: Path
) -> None:
    with connect(workers=2) as cluster:
        again = run(Store(tmp_path), generator, tokenizer, options=Options(cluster=cluster))
    assert digests(again) == digests(images)


def test_a_pass_is_decoded_while_the_next_one_is_sampled(
    generator: Artifact, tokenizer: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second pass is held back until the first one is decoded: this ends only if another thread does that."""
    decoded, sampled, decode = (
        threading.Event(),
        stages.sampling.generate.sampled_passes,
        stages.sampling.generate.decode_pass,
    )
    waits: list[bool] = []

    def watched(*place: Any, **more: Any) -> Any:
        result = decode(*place, **more)
        decoded.set()
        return result

    def held_back(*place: Any) -> Iterator[Any]:
        decoded.clear()  # the thread decodes a pass when it is made
        for number, codes_BT in enumerate(sampled(*place)):
            if number == 1:
                waits.append(decoded.wait(timeout=30))
            yield codes_BT

    monkeypatch.setattr(stages.sampling.generate, "decode_pass", watched)
    monkeypatch.setattr(stages.sampling.generate, "sampled_passes", held_back)
    run(Store(tmp_path), generator, tokenizer, CONFIG.model_copy(update={"images": 8}))
    assert waits == [True]


def test_every_five_thousand_of_the_published_protocol_hold_each_class_five_times() -> None:
    labels_I = choose_labels(SampleConfig(images=50_000), 1000, None)
    for first in range(0, 50_000, 5_000):
        assert (np.bincount(labels_I[first : first + 5_000], minlength=1000) == 5).all()


def test_a_decoding_that_fails_is_said_and_the_thread_serves_on(
    images: Artifact, generator: Artifact, tokenizer: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*place: Any, **more: Any) -> Any:
        raise CorruptError("this code has no picture")

    with monkeypatch.context() as patched:
        patched.setattr(stages.sampling.generate, "decode_pass", fail)
        with pytest.raises(CorruptError, match="this code has no picture"):
            run(Store(tmp_path), generator, tokenizer)
    assert digests(run(Store(tmp_path), generator, tokenizer)) == digests(images)


def test_weights_that_are_not_numbers_are_a_numeric_error(origin: Store, tokenizer: Artifact, tmp_path: Path) -> None:
    broken = generator_artifact(origin, tokenizer, poison="lm_head.bias")
    with pytest.raises(NumericError, match="samples 0 to 3 cannot be drawn"):
        run(Store(tmp_path), broken, tokenizer)


def test_labels_in_the_proportions_of_a_token_set(
    origin: Store, generator: Artifact, tokenizer: Artifact, tmp_path: Path
) -> None:
    like = token_artifact(origin, tokenizer, np.zeros((10, 1, 4), int), np.array([0] * 7 + [2] * 3), name="like")
    config = CONFIG.model_copy(update={"labels": "like", "images": 20})
    found = open_pictures(run(Store(tmp_path), generator, tokenizer, config, labels=like), size=None).labels_I
    assert np.bincount(found, minlength=3).tolist() == [14, 0, 6]


def test_another_tokenizer_is_refused(origin: Store, generator: Artifact, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="tokenizer"):
        run(Store(tmp_path), generator, tokenizer_artifact(origin, seed=1))
    with pytest.raises(CorruptError, match=f"generator of {CODES} codes"):
        run(Store(tmp_path), generator, tokenizer_artifact(origin, codes=CODES + 1))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"classes": (0, 3)}, "class 3 was asked for, but the generator has classes 0 to 2"),
        ({"order": (0, 1, 2, 2)}, "order must name each of the positions 0 to 3 once"),
        ({"labels": "like"}, "needs the input labels"),
        ({"shard_images": 8, "chunk_images": 3}, "chunk"),
    ],
)
def test_nonsense_is_refused(
    change: dict[str, object], sentence: str, generator: Artifact, tokenizer: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=sentence):
        run(Store(tmp_path), generator, tokenizer, CONFIG.model_copy(update=change))
