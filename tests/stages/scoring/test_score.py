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
from pipeline.errors import CorruptError, InputError, NumericError, UsageError
from pipeline.images.views import CenterViews
from pipeline.runner import Options, make
from pipeline.stage import Inputs
from pipeline.store import Store
from stages.scoring.figures import copies, mean_psnr, nearness, rounded
from stages.scoring.neighbours import nearest
from stages.scoring.protocol import CLASSIFIER, ScoreConfig, have_these_extractors
from stages.scoring.score import score_images as score
from stages.weights.networks import NetworkFile, load_classifier
from stages.weights.places import INCEPTION, WebFile
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


def run(
    store: Store,
    given: dict[str, Any],
    config: ScoreConfig = CONFIG,
    *,
    cluster: Any = None,
    paths: dict[str, Path] | None = None,
    **more: Any,
) -> Artifact:
    inputs = Inputs({**given, **{name.replace("_", "-"): value for name, value in more.items()}})
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


def test_features_are_no_part_of_the_artifact(scored: Artifact) -> None:
    assert set(scored.files) == {"metrics.json"}


@pytest.mark.parametrize("call", [2, 12, 25, 40, 48])
def test_interrupted_and_continued_gives_the_same_bytes(
    call: int, scored: Artifact, given: dict[str, Any], tmp_path: Path
) -> None:
    store = Store(tmp_path)
    with pytest.raises(Killed), killed_at(call):
        run(store, given)
    assert digests(run(store, given)) == digests(scored)


def test_shards_in_any_order_elsewhere_give_the_same_bytes(
    scored: Artifact, given: dict[str, Any], tmp_path: Path
) -> None:
    assert digests(run(Store(tmp_path), given, cluster=Backwards())) == digests(scored)


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


def test_a_best_score_of_other_judges_is_refused(scored: Artifact, given: dict[str, Any], tmp_path: Path) -> None:
    other = {**given, "classifiers": given["classifiers"][:1]}
    with pytest.raises(InputError, match="was not scored with the classifiers"):
        run(Store(tmp_path), other, best=scored)


def test_a_best_score_that_names_judges_by_their_manifests_still_serves(given: dict[str, Any]) -> None:
    former = {"extractors": [judge.digest for judge in given["classifiers"]]}
    assert have_these_extractors(former, CONFIG, Inputs(given))
    assert not have_these_extractors({"extractors": former["extractors"][:1]}, CONFIG, Inputs(given))
    assert not have_these_extractors({}, CONFIG.model_copy(update={"extractor": "inception"}), Inputs(given))


def test_a_best_score_against_another_reference_or_at_another_size_is_refused(
    scored: Artifact, given: dict[str, Any], origin: Store, tmp_path: Path
) -> None:
    other = images_artifact(origin, pictures(REFERENCE, 3), np.arange(REFERENCE) % CLASSES, name="another reference")
    with pytest.raises(InputError, match="was not scored with the reference"):
        run(Store(tmp_path), {**given, "reference": other}, best=scored)
    assert not list(tmp_path.rglob("shard-*"))  # before anything is extracted
    seen = CONFIG.model_copy(update={"views": CenterViews(size=SIZE)})
    with pytest.raises(InputError, match="was not scored with the settings"):
        run(Store(tmp_path), given, seen, best=scored)


def test_reconstructions_have_a_psnr(given: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path)
    noisy = pictures(REFERENCE, 1) ^ 1
    images = images_artifact(store, noisy, np.arange(REFERENCE) % CLASSES)
    found = run(store, {**given, "images": images}, CONFIG.model_copy(update={"pairs": True}))
    assert metrics(found)["values"]["psnr"] == pytest.approx(10 * np.log10(255**2), rel=1e-7)
    with pytest.raises(InputError, match="is no reconstruction of"):
        run(store, given, CONFIG.model_copy(update={"pairs": True}))


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
    with pytest.raises(UsageError, match="found only tokens"):
        run(Store(tmp_path), given, tokens=tokens)
    other = token_artifact(origin, tokenizer_artifact(origin, seed=1), training_ICT, labels, name="other")
    with pytest.raises(CorruptError, match="codes of different tokenizers"):
        run(Store(tmp_path), given, tokens=tokens, training=other)


def test_training_images_themselves_look_remembered(given: dict[str, Any], tmp_path: Path) -> None:
    found = metrics(run(Store(tmp_path), given, training_images=given["images"]))["values"]
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
        (7, 30, {}, "8 features needs at least 8 images, but images has 7"),
        (40, 7, {}, "8 features needs at least 8 images, but reference has 7"),
        (1, 30, {}, "needs at least 8 images, but images has 1"),
        (40, 30, {"splits": 41}, "41 splits of the Inception score needs at least 41 images, but images has 40"),
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


def test_features_that_are_not_numbers_are_refused(given: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path)
    broken = classifier_artifact(store, seed=2, poison="project.bias")
    with pytest.raises(NumericError, match="features of images 0 to 15 are not finite"):
        run(store, {**given, "classifiers": [broken]})


def test_what_does_not_fit_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path)
    small = images_artifact(store, np.zeros((40, 8, 8, 3), np.uint8), np.zeros(40), name="small")
    with pytest.raises(InputError, match="agree on pixels a side") as refused:
        run(store, {**given, "images": small})
    judge = given["classifiers"][0].name
    assert f"images ({small.name}) has 8, " in str(refused.value)
    assert f"classifier {judge} takes 16" in str(refused.value)
    with pytest.raises(UsageError, match="needs at least one classifier"):
        run(store, {**given, "classifiers": []})
    many = images_artifact(store, pictures(40, 0), np.arange(40), name="many")
    with pytest.raises(InputError, match=r"has class 39, but .* knows 0 to 2"):
        run(store, {**given, "images": many})


def test_inception_weights_are_checked_before_use(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("stages.scoring.protocol.INCEPTION_FEATURES", 8)
    path = tmp_path / "hub" / "checkpoints" / INCEPTION.file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not the weights")
    with pytest.raises(CorruptError, match=r"its SHA-256 begins with .*, expected 6726825d") as refusal:
        run(Store(tmp_path), given, CONFIG.model_copy(update={"extractor": "inception"}))
    assert "--weights FILE" in str(refusal.value.hint)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CorruptError, match=r"other.pth is not weights-inception.*expected 6726825d"):
        run(
            Store(tmp_path),
            given,
            CONFIG.model_copy(update={"extractor": "inception"}),
            paths={"weights": tmp_path / "other.pth"},
        )


def test_inception_needs_more_images_than_features(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WebFile, "find", lambda self: tmp_path)
    monkeypatch.setattr(WebFile, "check", lambda self, path: None)
    with pytest.raises(InputError, match="2048 features needs at least 2048 images, but images has 40"):
        run(Store(tmp_path), given, CONFIG.model_copy(update={"extractor": "inception"}))


def test_equal_images_have_the_largest_psnr() -> None:
    images = pictures(4, 0)
    assert mean_psnr(images, images) == pytest.approx(100)


@pytest.mark.parametrize(
    ("value", "kept"), [(0.0, 0.0), (-0.000123456789123, -0.00012345679), (1234567891.0, 1234567900.0)]
)
def test_rounding_keeps_eight_digits(value: float, kept: float) -> None:
    assert rounded(value) == kept
