"""probe: an accuracy that is right, two kinds of input, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.logistic import StreamedLogistic
from pipeline.artifact import Artifact
from pipeline.errors import CorruptError, UsageError
from pipeline.store import Store
from stages.training import probe
from stages.training.probe import one_hot
from tests.stages.conformance import check_every_crash, check_same_bytes, draw_folder, index_folder, run_stage
from tests.stages.small_artifacts import CLASSES, Killed, features_artifact
from tests.two_processes import run_two

ENCODER = {"kind": "whitened-patches", "image_size": 16, "cells": 2, "patch": 8, "dims": 5}


class Chain:
    """Images, codebook and token sets of the little pictures, where the class is easily seen."""

    def __init__(self, root: Path):
        self.root = root
        self.images = self.index("train", seed=0)
        self.features = run_stage("extract", root, {"encoder": ENCODER}, inputs={"images": self.images})
        self.codebook = self.cluster(6)
        self.train = self.tokenize(self.images, self.codebook)
        self.held_out = self.tokenize(self.index("held-out", seed=1), self.codebook)

    def index(self, name: str, **drawn: Any) -> Artifact:
        return index_folder(draw_folder(self.root / name, **drawn), self.root)

    def cluster(self, clusters: int) -> Artifact:
        config = {"clusters": clusters, "iterations": 5}
        return run_stage("kmeans", self.root, config, inputs={"features": self.features})

    def tokenize(self, images: Artifact, codebook: Artifact) -> Artifact:
        return run_stage("pretokenize", self.root, inputs={"images": images, "tokenizer": codebook})

    def probe(
        self, store: Path, config: dict[str, Any] | None = None, *, checkpoint_seconds: float = 30.0, **inputs: Artifact
    ) -> Artifact:
        given = {"train": self.train, "held-out": self.held_out, **inputs}
        return run_stage("probe", store, config, inputs=given, checkpoint_seconds=checkpoint_seconds)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("chain"))


def test_reads_the_class_off_the_codes(chain: Chain, tmp_path: Path) -> None:
    artifact = chain.probe(tmp_path)
    assert artifact.kind == "metrics"
    assert artifact.facts["accuracy"] >= 0.9
    assert artifact.figure == f"probe accuracy {100 * artifact.facts['accuracy']:.1f} %"
    assert artifact.facts["held_out_rows"] == 16


def test_reads_the_class_off_the_centroids(chain: Chain, tmp_path: Path) -> None:
    artifact = chain.probe(tmp_path, {"inputs": "centroids"}, codebook=chain.codebook)
    assert artifact.facts["accuracy"] >= 0.9


def test_accuracy_counts_the_held_out_images_alone(chain: Chain, tmp_path: Path) -> None:
    """Held-out pictures whose classes are swapped are all wrong, the training ones stay right."""
    swapped = draw_folder(tmp_path / "swapped", seed=1)
    (swapped / "class-0").rename(swapped / "class-2")
    (swapped / "class-1").rename(swapped / "class-0")
    (swapped / "class-2").rename(swapped / "class-1")
    other = chain.tokenize(index_folder(swapped, chain.root), chain.codebook)
    right, wrong = chain.probe(tmp_path).facts, chain.probe(tmp_path, **{"held-out": other}).facts
    assert wrong["accuracy"] == pytest.approx(1 - right["accuracy"])
    assert wrong["train_accuracy"] == right["train_accuracy"]


def test_one_hot_marks_each_position_with_its_code() -> None:
    dense = one_hot(np.array([[2, 0], [1, 1]]), 3).toarray()
    assert dense.tolist() == [[0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 1, 0]]


def test_every_crash(chain: Chain, tmp_path: Path) -> None:
    check_every_crash(chain.probe, tmp_path)


def test_refuses_codes_of_another_codebook(chain: Chain, tmp_path: Path) -> None:
    other = chain.cluster(5)
    with pytest.raises(CorruptError, match=r"cannot use .* together: codes of the tokenizer"):
        chain.probe(tmp_path, train=chain.tokenize(chain.images, other))
    with pytest.raises(CorruptError, match=r"cannot use .* together: a vocabulary of 5"):
        chain.probe(tmp_path, {"inputs": "centroids"}, codebook=other)


def test_refuses_other_classes(chain: Chain, tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "folder", classes=3, images=2)
    with pytest.raises(CorruptError, match=r"3 classes in .*, but 2 classes in"):
        chain.probe(tmp_path, **{"held-out": chain.tokenize(index_folder(folder, tmp_path), chain.codebook)})


def test_refuses_a_single_class(chain: Chain, tmp_path: Path) -> None:
    single = chain.tokenize(index_folder(draw_folder(tmp_path / "folder", classes=1), tmp_path), chain.codebook)
    with pytest.raises(UsageError, match="needs images of two classes at least"):
        chain.probe(tmp_path, train=single, **{"held-out": single})


def test_codebook_and_inputs_belong_together(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="reads no codebook"):
        chain.probe(tmp_path, {"inputs": "centroids"})
    with pytest.raises(UsageError, match="set inputs: centroids"):
        chain.probe(tmp_path, codebook=chain.codebook)
    with pytest.raises(UsageError, match="one-hot"):
        chain.probe(tmp_path, {"inputs": "pixels"})


@pytest.mark.parametrize("inputs", ["one-hot", "centroids"])
def test_in_batches_where_the_exact_solver_would_be_too_large(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: str
) -> None:
    more = {"codebook": chain.codebook} if inputs == "centroids" else {}
    monkeypatch.setattr(probe, "BATCH", 4)
    exact = chain.probe(tmp_path / "exact", {"inputs": inputs}, **more).facts
    monkeypatch.setattr(probe, "LBFGS_BYTES", 0)
    batches = chain.probe(tmp_path / "batches", {"inputs": inputs}, **more).facts
    assert (exact["solver"], batches["solver"]) == ("l-bfgs", "batches")
    assert batches["steps"] == 10 * -(-exact["train_rows"] // 4)
    for name in ("accuracy", "train_accuracy"):
        assert batches[name] == pytest.approx(exact[name], abs=0.1)


def test_batches_continue_from_their_checkpoint(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BATCH", 4), ("LBFGS_BYTES", 0), ("CALM_SECONDS", 0.0)):
        monkeypatch.setattr(probe, name, value)
    whole = chain.probe(tmp_path / "whole", checkpoint_seconds=0.0)
    advance, calls = StreamedLogistic.advance, iter(range(7))

    def interrupted(*given: Any) -> None:
        if next(calls, None) is None:
            raise Killed
        advance(*given)

    monkeypatch.setattr(StreamedLogistic, "advance", interrupted)
    with pytest.raises(Killed):
        chain.probe(tmp_path / "again", checkpoint_seconds=0.0)
    steps: list[int] = []
    monkeypatch.setattr(StreamedLogistic, "advance", lambda model, *given: steps.append(1) or advance(model, *given))
    check_same_bytes(whole, chain.probe(tmp_path / "again", checkpoint_seconds=0.0))
    assert len(steps) == whole.facts["steps"] - 7


def draw_features(root: Path, *, seed: int, images: int, shift: int = 0, **facts: Any) -> Artifact:
    """Two views of each image, whose class is seen in one of the values; the labels may say another class."""
    labels_I = np.arange(images) % CLASSES
    features_ND = np.random.default_rng(seed).normal(0, 0.3, (2 * images, 6)).astype(np.float32)
    features_ND[np.arange(2 * images), np.repeat(labels_I, 2)] += 2
    name = f"{seed} {shift} {facts}"
    return features_artifact(Store(root), features_ND, (labels_I + shift) % CLASSES, name=name, **facts)


def probe_features(store: Path, *, checkpoint_seconds: float = 30.0, **given: Any) -> Artifact:
    training = {"steps": 40, "batch": 24, "evaluate_every": 20, **given.pop("training", {})}
    train = given.pop("train", None) or draw_features(store, seed=0, images=60)
    held_out = draw_features(store, **{"seed": 1, "images": 30, **given})
    inputs = {"train": train, "held-out": held_out}
    return run_stage("probe", store, {"training": training}, inputs=inputs, checkpoint_seconds=checkpoint_seconds)


def test_a_linear_layer_learns_the_class_of_features(tmp_path: Path) -> None:
    facts = probe_features(tmp_path).facts
    assert (facts["accuracy"], facts["train_accuracy"]) == (1.0, 1.0)
    assert (facts["train_rows"], facts["held_out_rows"]) == (120, 60)
    assert (facts["solver"], facts["layer"], facts["steps"]) == ("sgd", 1, 40)
    facts = probe_features(tmp_path, shift=1).facts
    assert (facts["accuracy"], facts["train_accuracy"]) == (0.0, 1.0)


@pytest.mark.crash
def test_a_probe_of_features_is_whole_after_any_crash(tmp_path: Path) -> None:
    def make(store: Path) -> Artifact:
        return probe_features(store, training={"steps": 4, "batch": 8}, checkpoint_seconds=0.0)

    make(tmp_path / "whole")  # the crashes are those of the probe, not of its inputs
    check_every_crash(make, tmp_path, most=6)


def test_two_processes_train_one_layer(tmp_path: Path) -> None:
    probe_features(tmp_path / "shared", training={"steps": 1})
    alone = probe_features(tmp_path).facts
    for facts in run_two(tmp_path, lambda own, rank: dict(probe_features(tmp_path / "shared").facts)):
        assert facts == alone


def test_refuses_features_that_do_not_go_together(chain: Chain, tmp_path: Path) -> None:
    for name, value in {"layer": 2, "generator": "1" * 64, "classes": 5}.items():
        with pytest.raises((CorruptError, UsageError), match=name):
            probe_features(tmp_path, **{name: value})
    with pytest.raises((CorruptError, UsageError), match="give features of describe-tokens"):
        probe_features(tmp_path, train=chain.features)
    with pytest.raises(UsageError, match=r"training\.batch 500, but there are only 120 rows"):
        probe_features(tmp_path, training={"batch": 500})
