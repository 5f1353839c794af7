"""Features as an artifact: what the networks give, moments that no cut changes, published statistics, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from pipeline.artifact import Artifact
from pipeline.cluster import InProcess
from pipeline.errors import CorruptError, InputError, NumericError, UsageError
from pipeline.images.views import EvalCropViews
from pipeline.runner import Options, make
from pipeline.stage import Inputs
from pipeline.store import Store
from stages.scoring.describe_images import DescribeConfig, describe_images, described_as
from stages.scoring.features import ImageFeatures, Moments, join
from stages.scoring.figures import distances
from stages.scoring.protocol import INCEPTION_FEATURES, inception
from stages.weights.networks import NetworkFile, load_classifier
from stages.weights.places import INCEPTION
from tests.stages.conformance import draw_folder, index_folder
from tests.stages.small_artifacts import (
    CLASSES,
    SIZE,
    Backwards,
    Killed,
    classifier_artifact,
    digests,
    images_artifact,
    killed_at,
)

COUNT = 40
PICTURES = np.random.default_rng(0).integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("origin"))


@pytest.fixture(scope="module")
def given(origin: Store) -> dict[str, Any]:
    return {
        "images": images_artifact(origin, PICTURES, np.arange(COUNT) % CLASSES, name="images"),
        "classifiers": [classifier_artifact(origin, seed=seed) for seed in (0, 1)],
    }


@pytest.fixture(scope="module")
def described(origin: Store, given: dict[str, Any]) -> Artifact:
    return describe(origin, given)


def describe(
    store: Store,
    given: dict[str, Any],
    *,
    cluster: Any = None,
    paths: dict[str, Path] | None = None,
    **changes: Any,
) -> Artifact:
    config = DescribeConfig.model_validate({"rows_per_pass": 8, "shard_images": 16, **changes})
    options = Options(cluster=cluster or InProcess())
    return make(store, describe_images, config, Inputs(given), paths or {}, options).artifact


def test_features_are_what_the_networks_give(described: Artifact, given: dict[str, Any]) -> None:
    group: Any = zarr.open_group(described.path, mode="r")
    images = torch.from_numpy(PICTURES).permute(0, 3, 1, 2) / 255
    for number, judge in enumerate(given["classifiers"]):
        with torch.inference_mode():
            network = load_classifier(NetworkFile.of(judge, "cpu"))
            expected = network.features(images).numpy()
            logits = network(images).numpy()
        np.testing.assert_allclose(group[f"features-{number}"][:], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(group[f"logits-{number}"][:], logits, rtol=1e-4, atol=1e-5)
        stored = group[f"features-{number}"][:].astype(np.float64)
        np.testing.assert_allclose(group[f"mean-{number}"][:], stored.mean(0), rtol=1e-12)
        np.testing.assert_allclose(group[f"covariance-{number}"][:], np.cov(stored.T), rtol=1e-9, atol=1e-12)
    assert group["labels"][:].tolist() == (np.arange(COUNT) % CLASSES).tolist()
    assert (group["thumbnails"][:] == PICTURES.reshape(COUNT, -1)).all()
    assert group.attrs["image-features"] == described.facts
    assert [one.id for one in ImageFeatures(described).extractors] == [one.content for one in given["classifiers"]]


def test_moments_do_not_depend_on_how_rows_are_cut() -> None:
    rows_RE = np.random.default_rng(0).normal(5, 2, (100, 4)).astype(np.float32)
    whole = Moments.of(rows_RE)
    for cut in (1, 7, 64):
        joined = join(Moments.of(rows_RE[start : start + cut]) for start in range(0, 100, cut))
        assert joined.rows == 100
        np.testing.assert_allclose(joined.mean_E, whole.mean_E, rtol=1e-13)
        np.testing.assert_allclose(joined.covariance_EE, np.cov(rows_RE.astype(np.float64).T), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("call", [2, 10, 25, 40, 50])
def test_interrupted_and_continued_gives_the_same_bytes(
    call: int, described: Artifact, given: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(Killed), killed_at(call):
        describe(Store(tmp_path), given)
    assert digests(describe(Store(tmp_path), given)) == digests(described)


def test_shards_in_any_order_elsewhere_give_the_same_bytes(
    described: Artifact, given: dict[str, Any], tmp_path: Path
) -> None:
    assert digests(describe(Store(tmp_path), given, cluster=Backwards())) == digests(described)


def test_others_are_described_alike(origin: Store, given: dict[str, Any], described: Artifact, tmp_path: Path) -> None:
    config, inputs = described_as(described, given["images"], origin)
    assert make(origin, describe_images, config, inputs, {}, Options()).reused
    folder = index_folder(draw_folder(tmp_path, images=2, pixels=40), origin.root)
    seen = make(origin, describe_images, *described_as(described, folder, origin), {}, Options()).artifact
    assert ImageFeatures(seen).description.contradiction(ImageFeatures(described).description) is None
    cropped = describe(origin, {**given, "images": folder}, views=EvalCropViews(size=SIZE))
    assert make(origin, describe_images, *described_as(cropped, folder, origin), {}, Options()).reused
    differing = ImageFeatures(seen).description.contradiction(ImageFeatures(cropped).description)
    assert differing is not None
    assert "'kind': 'center'" in differing[0]


def test_published_statistics_stand_for_a_reference(origin: Store, tmp_path: Path) -> None:
    """Frechet distances need no more of a reference; the images in the file are not looked at."""
    rng = np.random.default_rng(0)
    mean, spread = rng.normal(size=INCEPTION_FEATURES), rng.uniform(1, 2, INCEPTION_FEATURES)
    np.savez(tmp_path / "reference.npz", mu=mean, sigma=np.diag(spread), arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    found = ImageFeatures(
        describe(
            origin, {}, paths={"statistics": tmp_path / "reference.npz"}, source="statistics", extractor="inception"
        )
    )
    reference = found.extracted(0)
    assert (found.images, reference.features_NE, found.extractors) == (None, None, [inception("inception")])
    assert (reference.mean_E == mean).all()
    assert (reference.covariance_EE == np.diag(spread)).all()
    settings: Any = {"splits": 1, "shuffle": False, "subsets": 1, "subset_size": 2, "neighbours": 1}
    assert distances(reference, reference, **settings) == {"distance": pytest.approx(0, abs=1e-6)}


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mu": np.zeros(8), "sigma": np.zeros((8, 8))}, r"mu has shape \(8,\)"),
        ({"arr_0": np.zeros(8)}, "mu and sigma cannot be read"),
        ({"mu": np.array([None]), "sigma": np.zeros((8, 8))}, "allow_pickle"),
        ({"mu": np.full(2048, np.nan), "sigma": np.zeros((2048, 2048))}, "NaN or infinity"),
    ],
)
def test_other_files_are_no_statistics(arrays: dict[str, Any], said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(CorruptError, match=said):
        describe(
            Store(tmp_path),
            {},
            paths={"statistics": tmp_path / "other.npz"},
            source="statistics",
            extractor="inception",
        )


def test_features_that_are_not_numbers_are_refused(given: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path)
    broken = classifier_artifact(store, seed=2, poison="project.bias")
    with pytest.raises(NumericError, match="features of images 0 to 15 are not finite"):
        describe(store, {**given, "classifiers": [broken]})


def test_what_does_not_fit_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path)
    small = images_artifact(store, np.zeros((40, 8, 8, 3), np.uint8), np.zeros(40), name="small")
    with pytest.raises(InputError, match=r"images \(.*\) has 8, classifier .* takes 16"):
        describe(store, {**given, "images": small})
    with pytest.raises(UsageError, match=r"describes by classifiers .*, but reads none"):
        describe(store, {**given, "classifiers": []})
    many = images_artifact(store, PICTURES, np.arange(40), name="many")
    with pytest.raises(InputError, match=r"has class 39, but .* knows 0 to 2"):
        describe(store, {**given, "images": many})
    single = images_artifact(store, PICTURES[:1], np.zeros(1), name="single")
    with pytest.raises(InputError, match="has 1 image, but a covariance needs at least 2"):
        describe(store, {**given, "images": single})


def test_inception_weights_are_checked_before_use(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / INCEPTION.file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not the weights")
    with pytest.raises(CorruptError, match=r"its SHA-256 begins with .*, expected 6726825d") as refusal:
        describe(Store(tmp_path), given, extractor="inception")
    assert "--weights FILE" in str(refusal.value.hint)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CorruptError, match=r"other.pth is not weights-inception.*expected 6726825d"):
        describe(Store(tmp_path), given, extractor="inception", paths={"weights": tmp_path / "other.pth"})
