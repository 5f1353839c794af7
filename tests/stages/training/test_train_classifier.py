"""train-classifier: it learns, continues after any crash with the same bytes, and refuses what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import Artifact
from pipeline.errors import UsageError
from stages.weights.networks import NetworkFile, load_classifier
from tests.stages.conformance import check_every_crash, draw_folder, index_folder, run_stage

MODEL = {"kind": "convolutional", "image_size": 16, "classes": 2, "widths": [8, 8, 8, 8], "features": 8}
TINY: dict[str, Any] = {
    "model": MODEL,
    "views": {"kind": "shifts", "size": 16, "pixels": 1},
    "rows_per_pass": 6,
    "training": {"steps": 4, "batch": 8},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("images")
    return index_folder(draw_folder(folder / "train", images=10), folder / "store")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("held-out")
    return index_folder(draw_folder(folder / "val", images=5, seed=1), folder / "store")


def test_it_learns_and_says_how_well(tmp_path: Path, images: Artifact, held_out: Artifact) -> None:
    config = {**TINY, "training": {"steps": 30, "batch": 10}}
    made = run_stage("train-classifier", tmp_path, config, inputs={"images": images, "held-out": held_out})
    assert made.facts["accuracy"] == 1.0
    assert made.figure == "100.0 % on held-out"
    assert load_classifier(NetworkFile.of(made, "cpu")).config.classes == 2


def test_without_held_out_images_the_figure_says_so(tmp_path: Path, images: Artifact) -> None:
    made = run_stage("train-classifier", tmp_path, TINY, inputs={"images": images})
    assert made.figure.endswith("on training images")


@pytest.mark.crash
def test_whole_after_any_crash(tmp_path: Path, images: Artifact, held_out: Artifact) -> None:
    inputs = {"images": images, "held-out": held_out}
    check_every_crash(
        lambda store: run_stage("train-classifier", store, TINY, inputs=inputs, checkpoint_seconds=0.0),
        tmp_path,
        most=6,
    )


def test_seeds_give_other_weights_and_threads_of_decoding_do_not(tmp_path: Path, images: Artifact) -> None:
    from stages.training import images as training_images

    def weights(**training: Any) -> str:
        config = {**TINY, "training": {**TINY["training"], **training}}
        made = run_stage("train-classifier", tmp_path, config, inputs={"images": images}, force=True)
        return made.files["weights.safetensors"].sha256

    cached = weights()
    before, training_images.CACHE_BYTES = training_images.CACHE_BYTES, 0  # then views are decoded as they come
    try:
        assert weights() == cached
    finally:
        training_images.CACHE_BYTES = before
    assert weights(seed=1) != cached


def test_other_classes_are_refused(tmp_path: Path, images: Artifact) -> None:
    config = {**TINY, "model": {**MODEL, "classes": 3}}
    with pytest.raises(UsageError, match=r"has model\.classes 3, but .* has 2 classes; leave model\.classes out"):
        run_stage("train-classifier", tmp_path, config, inputs={"images": images})


def test_views_of_another_size_are_refused(tmp_path: Path, images: Artifact) -> None:
    with pytest.raises(UsageError, match=r"views\.size is 32, but model\.image_size is 16"):
        run_stage(
            "train-classifier", tmp_path, {**TINY, "views": {"kind": "center", "size": 32}}, inputs={"images": images}
        )
