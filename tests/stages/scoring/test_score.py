"""Scoring: torch-fidelity's figures under a judge of ours, and refusals where a figure would mean nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from torch.utils.data import TensorDataset

from pipeline.artifact import Artifact
from pipeline.cluster import InProcess
from pipeline.errors import CorruptError, InputError, UsageError
from pipeline.runner import Options, make
from pipeline.stage import Inputs
from pipeline.store import Store
from stages.scoring.describe_images import DescribeConfig, describe_images
from stages.scoring.extractors import CLASSIFIER
from stages.scoring.figures import copies, nearness, psnr_each, rounded
from stages.scoring.neighbours import nearest
from stages.scoring.score import ScoreConfig
from stages.scoring.score import score_images as score
from stages.weights.networks import NetworkFile, load_classifier
from tests.stages.small_artifacts import (
    CLASSES,
    CODES,
    SIZE,
    Backwards,
    Killed,
    classifier_artifact,
    digests,
    images_artifact,
    killed_at,
    token_artifact,
    tokenizer_artifact,
)

IMAGES, REFERENCE = 40, 30
CONFIG = ScoreConfig(rows_per_pass=8, shard_images=16, splits=4, subsets=5, subset_size=20)
DESCRIBED = {"rows_per_pass": 8, "shard_images": 16}


def pictures(count: int, seed: int) -> np.ndarray:
    """Flat colours with noise: the three classes are three brightnesses."""
    rng = np.random.default_rng(seed)
    levels = 60 + 60 * (np.arange(count) % CLASSES)
    return np.clip(levels[:, None, None, None] + rng.normal(0, 25, (count, SIZE, SIZE, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("origin"))


@pytest.fixture(scope="module")
def given(origin: Store) -> dict[str, Any]:
    """Images, reference and two judges."""
    return {
        "images": images_artifact(origin, pictures(IMAGES, 0), np.arange(IMAGES) % CLASSES, name="images"),
        "reference": images_artifact(origin, pictures(REFERENCE, 1), np.arange(REFERENCE) % CLASSES, name="reference"),
        "classifiers": [classifier_artifact(origin, seed=seed) for seed in (0, 1)],
    }


@pytest.fixture(scope="module")
def scored(origin: Store, given: dict[str, Any]) -> Artifact:
    return run(origin, given)


def describe(
    store: Store, images: Artifact, classifiers: list[Artifact], *, cluster: Any = None, **changes: Any
) -> Artifact:
    config = DescribeConfig.model_validate({**DESCRIBED, **changes})
    inputs = Inputs({"images": images, "classifiers": classifiers})
    return make(store, describe_images, config, inputs, {}, Options(cluster=cluster or InProcess())).artifact


def run(
    store: Store,
    given: dict[str, Any],
    config: ScoreConfig = CONFIG,
    *,
    cluster: Any = None,
    paths: dict[str, Path] | None = None,
    **more: Any,
) -> Artifact:
    """The score of images against a reference, both described by the classifiers."""
    sides = {name: describe(store, given[name], given["classifiers"]) for name in ("images", "reference")}
    found = {"features": sides["images"], "reference": sides["reference"]}
    inputs = Inputs({**found, **{name.replace("_", "-"): value for name, value in more.items()}})
    return make(store, score, config, inputs, paths or {}, Options(cluster=cluster or InProcess())).artifact


def metrics(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.path / "metrics.json").read_bytes())


class Bytes(TensorDataset):
    def __getitem__(self, index: int) -> torch.Tensor:
        return super().__getitem__(index)[0]


def test_the_figures_are_torch_fidelitys(scored: Artifact, given: dict[str, Any]) -> None:
    sets = [Bytes(torch.from_numpy(pictures(*one)).permute(0, 3, 1, 2)) for one in ((IMAGES, 0), (REFERENCE, 1))]
    expected = torch_fidelity.calculate_metrics(
        input1=sets[0],
        input2=sets[1],
        feature_extractor=CLASSIFIER,
        classifier=NetworkFile.of(given["classifiers"][0], "cpu"),
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
        batch_size=8,
        isc_splits=4,
        kid_subsets=5,
        kid_subset_size=20,
    )
    found = metrics(scored)["each"][0]
    names = {
        "distance": "frechet_inception_distance",
        "inception_score": "inception_score_mean",
        "kernel_distance": "kernel_inception_distance_mean",
        "precision": "precision",
        "recall": "recall",
    }
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(expected[theirs], rel=1e-3, abs=1e-6), ours


def test_the_mean_over_judges_and_what_each_says(scored: Artifact, given: dict[str, Any]) -> None:
    found = metrics(scored)
    assert found["protocol"] == "classifier-8"
    assert (found["images"], found["reference"]) == (IMAGES, REFERENCE)
    assert found["values"]["distance"] == pytest.approx(np.mean([one["distance"] for one in found["each"]]))
    assert found["each"][0]["distance"] != found["each"][1]["distance"]
    images = torch.from_numpy(pictures(IMAGES, 0)).permute(0, 3, 1, 2) / 255
    for judge, said in zip(given["classifiers"], found["judges"], strict=True):
        guesses = load_classifier(NetworkFile.of(judge, "cpu"))(images).argmax(1).numpy()
        assert said["consistency"] == pytest.approx((guesses == np.arange(IMAGES) % CLASSES).mean())
    assert scored.facts["values"] == found["values"]


@pytest.mark.parametrize("call", [2, 20, 40, 56, 66])
def test_interrupted_and_continued_gives_the_same_bytes(
    call: int, origin: Store, given: dict[str, Any], tmp_path: Path
) -> None:
    store, training = Store(tmp_path), describe(origin, given["images"], given["classifiers"])
    with pytest.raises(Killed), killed_at(call):
        run(store, given, training_features=training)
    there = run(origin, given, training_features=training, cluster=Backwards())
    assert digests(run(store, given, training_features=training)) == digests(there)
    assert set(there.files) == {"metrics.json"}


def test_as_a_multiple_of_the_best_possible(scored: Artifact, given: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path)
    worse = images_artifact(store, 255 - pictures(IMAGES, 2) // 2, np.arange(IMAGES) % CLASSES)
    found = run(store, {**given, "images": worse}, best=scored)
    ratios = [
        one["distance"] / ideal["distance"]
        for one, ideal in zip(metrics(found)["each"], metrics(scored)["each"], strict=True)
    ]
    assert metrics(found)["values"]["ratio"] == pytest.approx(np.mean(ratios), rel=1e-6)
    assert " x best possible, consistency " in found.figure


def test_a_best_score_against_another_reference_is_refused(
    scored: Artifact, given: dict[str, Any], origin: Store, tmp_path: Path
) -> None:
    """Other judges, sizes and views make other features of the reference, too."""
    other = images_artifact(origin, pictures(REFERENCE, 3), np.arange(REFERENCE) % CLASSES, name="another reference")
    for changed in ({"reference": other}, {"classifiers": given["classifiers"][:1]}):
        with pytest.raises(InputError, match="was not scored against"):
            run(Store(tmp_path), {**given, **changed}, best=scored)


def test_features_of_other_extractors_cannot_be_compared(origin: Store, given: dict[str, Any], tmp_path: Path) -> None:
    ours = describe(origin, given["images"], given["classifiers"])
    theirs = describe(origin, given["reference"], given["classifiers"][:1])
    with pytest.raises(CorruptError, match=r"describes images by classifier .*, classifier .*, but .* by classifier"):
        make(Store(tmp_path), score, CONFIG, Inputs({"features": ours, "reference": theirs}), {}, Options())


def test_reconstructions_have_a_psnr(given: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path)
    noisy = pictures(REFERENCE, 1) ^ 1
    images = images_artifact(store, noisy, np.arange(REFERENCE) % CLASSES)
    found = run(store, {**given, "images": images}, images=images, originals=given["reference"])
    assert metrics(found)["values"]["psnr"] == pytest.approx(10 * np.log10(255**2), rel=1e-7)
    with pytest.raises(InputError, match="is not a reconstruction of"):
        run(store, given, images=given["images"], originals=given["reference"])
    with pytest.raises(InputError, match=r"describes other images than .* \(images\)"):
        run(store, given, images=images, originals=given["reference"])
    with pytest.raises(UsageError, match="reads only one of them"):
        run(store, given, images=images)


def test_copies_of_training_codes_are_counted(origin: Store, given: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = tokenizer_artifact(origin)
    training_ICT = np.random.default_rng(0).integers(0, CODES, (10, 2, 4))
    drawn_ICT = (training_ICT[:, 1:] + 1) % CODES
    drawn_ICT[3] = training_ICT[7, 1]
    labels = np.zeros(10, int)
    training = token_artifact(origin, tokenizer, training_ICT, labels, name="training")
    tokens = token_artifact(origin, tokenizer, drawn_ICT, labels, name="drawn")
    assert metrics(run(Store(tmp_path), given, tokens=tokens, training=training))["values"]["copies"] == pytest.approx(
        copies(drawn_ICT[:, 0], [training_ICT[:7].reshape(-1, 4), training_ICT[7:].reshape(-1, 4)])
    )
    assert copies(drawn_ICT[3], [training_ICT[7]]) == 1
    assert copies(training_ICT[0, :1] ^ 1, [training_ICT[0, :1]]) == 0
    with pytest.raises(UsageError, match="reads only tokens"):
        run(Store(tmp_path), given, tokens=tokens)
    other = token_artifact(origin, tokenizer_artifact(origin, seed=1), training_ICT, labels, name="other")
    with pytest.raises(CorruptError, match="codes of different tokenizers"):
        run(Store(tmp_path), given, tokens=tokens, training=other)


def test_training_images_themselves_look_remembered(given: dict[str, Any], tmp_path: Path) -> None:
    training = describe(Store(tmp_path), given["images"], given["classifiers"])
    found = metrics(run(Store(tmp_path), given, training_features=training))["values"]
    assert (found["nn_med"], found["nn_p05"]) == (1, 1)


def test_unseen_data_look_unseen() -> None:
    rng = np.random.default_rng(0)
    ours, unseen, training = (rng.integers(0, 256, (count, 5), dtype=np.uint8) for count in (2000, 2000, 300))
    near = [np.sqrt(nearest(some, training, device=torch.device("cpu")).astype(float)) for some in (ours, unseen)]
    found = nearness(*near)
    assert found["nn_med"] == pytest.approx(0.5, abs=0.04)
    assert found["nn_p05"] == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize(
    ("images", "reference", "change", "sentence"),
    [
        (7, 30, {}, "8 features needs at least 8 images, but features has 7"),
        (40, 7, {}, "8 features needs at least 8 images, but reference has 7"),
        (2, 30, {}, "needs at least 8 images, but features has 2"),
        (40, 30, {"splits": 41}, "41 splits of the Inception score needs at least 41 images, but features has 40"),
        (40, 30, {"neighbours": 30}, "30 neighbours needs at least 31 images, but reference has 30"),
    ],
)
def test_too_few_images_are_refused_with_the_minimum(
    images: int, reference: int, change: dict[str, int], sentence: str, given: dict[str, Any], tmp_path: Path
) -> None:
    store = Store(tmp_path)
    sets = {
        name: images_artifact(store, pictures(count, 0), np.arange(count) % CLASSES, name=name)
        for name, count in (("images", images), ("reference", reference))
    }
    with pytest.raises(InputError, match=sentence):
        run(store, {**given, **sets}, CONFIG.model_copy(update=change))


def test_equal_images_have_the_largest_psnr() -> None:
    images = pictures(4, 0)
    assert psnr_each(images, images).tolist() == [pytest.approx(100)] * 4


@pytest.mark.parametrize(
    ("value", "kept"), [(0.0, 0.0), (-0.000123456789123, -0.00012345679), (1234567891.0, 1234567900.0)]
)
def test_rounding_keeps_eight_digits(value: float, kept: float) -> None:
    assert rounded(value) == kept
