"""Scores of reconstructions: known values of each figure, each system's own input, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from torch_fidelity import feature_extractor_inceptionv3 as published
from torchvision.models.vgg import cfgs, make_layers

from models.adapters.lpips import lpips_heads
from models.losses.perceptual import TAPS, Lpips
from pipeline.artifact import Artifact
from pipeline.cluster import InProcess
from pipeline.errors import CorruptError, InputError, StorageError, UsageError
from pipeline.images import ImageSet
from pipeline.images.views import EvalCropViews
from pipeline.runner import Options, make
from pipeline.stage import Inputs
from pipeline.store import Store
from stages.scoring.describe_images import DescribeConfig, choose_extractors, describe_images
from stages.scoring.extractors import INCEPTION_LAYERS, PYTORCH_FID, REGISTERED, PytorchFidExtractor
from stages.scoring.figures import ssim_each
from stages.scoring.score import ScoreConfig
from stages.scoring.score import score_images as score
from stages.weights.perceptual import package_heads
from stages.weights.places import VGG16
from tests.stages.conformance import draw_folder, index_folder
from tests.stages.small_artifacts import (
    CLASSES,
    CODES,
    SIZE,
    Backwards,
    classifier_artifact,
    digests,
    images_artifact,
    token_artifact,
    tokenizer_artifact,
)

PAIRS = 12
CONFIG: dict[str, Any] = {
    "rows_per_pass": 5,
    "shard_images": 8,
    "splits": 2,
    "subsets": 2,
    "subset_size": 5,
    "neighbours": 2,
}


def run(
    store: Store,
    given: dict[str, Any],
    *,
    paths: dict[str, Path] | None = None,
    cluster: Any = None,
    views: Any = None,
    **changes: Any,
) -> Artifact:
    """The score of images and, where they are given, their originals, both described by the judges."""
    config, others = ScoreConfig.model_validate({**CONFIG, **changes}), dict(given)
    judges, options = others.pop("classifiers"), Options(cluster=cluster or InProcess())
    for name, images in (("features", "images"), ("reference", "originals")):
        seen = DescribeConfig.model_validate({"views": views if given[images].kind == "image-set" else None})
        asked = Inputs({"images": given[images], "classifiers": judges})
        others[name] = make(store, describe_images, seen, asked, {}, options).artifact
    return make(store, score, config, Inputs(others), paths or {}, options).artifact


def values(artifact: Artifact) -> dict[str, float]:
    found: dict[str, float] = json.loads((artifact.path / "metrics.json").read_bytes())["values"]
    return found


def flat(store: Store, levels: NDArray[Any], name: str) -> Artifact:
    """One flat picture of each grey level."""
    pictures = np.broadcast_to(levels.astype(np.uint8)[:, None, None, None], (len(levels), SIZE, SIZE, 3))
    return images_artifact(store, np.ascontiguousarray(pictures), np.arange(len(levels)) % CLASSES, name=name)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def given(store: Store) -> dict[str, Any]:
    """Flat pictures whose reconstructions are 16 levels brighter."""
    levels = np.arange(PAIRS) * 15
    return {
        "images": flat(store, levels + 16, "brighter"),
        "originals": flat(store, levels, "flat"),
        "classifiers": [classifier_artifact(store)],
    }


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like torchvision's, with other weights."""
    torch.manual_seed(0)
    state = make_layers(cfgs["D"])[: TAPS[-1] + 1].state_dict()
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save({f"features.{name}": tensor for name, tensor in state.items()}, path)
    return path


def test_ssim_of_flat_pictures_is_that_of_their_means(store: Store, given: dict[str, Any]) -> None:
    found = values(run(store, given, figures=["ssim"]))
    one, other = (np.arange(PAIRS) * 15 + 16) / 255, np.arange(PAIRS) * 15 / 255
    constant = 0.01**2
    expected = (2 * one * other + constant) / (one**2 + other**2 + constant)
    assert found["ssim"] == pytest.approx(expected.mean(), rel=1e-6)
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / 16**2), rel=1e-6)


def test_ssim_is_that_of_unit_range_and_colour() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 256, (2, 3, 12, 12, 3)).astype(np.uint8)
    expected = [
        structural_similarity(a / 255.0, b / 255.0, win_size=7, data_range=1.0, channel_axis=2)
        for a, b in zip(one, other, strict=True)
    ]
    assert ssim_each(one, other).tolist() == pytest.approx(expected)
    assert ssim_each(one, one).tolist() == [1, 1, 1]


def test_usage_counts_distinct_codes(store: Store, given: dict[str, Any]) -> None:
    codes_ICT = np.array([[[0, 1, 1, 3]], [[3, 3, 1, 0]], [[0, 3, 1, 0]]])  # each of three codes four times
    tokens = token_artifact(store, tokenizer_artifact(store), codes_ICT, np.zeros(3, int), name="three codes")
    found = run(store, {**given, "tokens": tokens}, figures=["usage"], shard_images=2)
    assert (values(found)["usage"], values(found)["perplexity"]) == (3 / CODES, pytest.approx(3))
    assert "38% of the codes used" in found.figure
    with pytest.raises(UsageError, match="measures the usage of the codebook"):
        run(store, given, figures=["usage"])


def test_lpips_is_the_networks_mean(store: Store, given: dict[str, Any], vgg: Path) -> None:
    found = run(store, given, figures=["lpips"], paths={"perceptual": vgg})
    features = {name.removeprefix("features."): tensor for name, tensor in torch.load(vgg).items()}
    lpips = Lpips(features, lpips_heads(package_heads()), pixel_range="-1..1")
    pixels = (np.arange(PAIRS)[:, None, None, None] * 15).repeat(3, 1) + np.zeros((1, 1, SIZE, SIZE))
    pair = [torch.from_numpy((pixels + brighter) / 127.5 - 1).float() for brighter in (16, 0)]
    assert values(found)["lpips"] == pytest.approx(float(lpips(*pair).mean()), rel=1e-4)
    assert " LPIPS " in found.figure
    same = {**given, "images": given["originals"]}
    assert values(run(store, same, figures=["lpips"], paths={"perceptual": vgg}))["lpips"] == 0


def test_shards_in_any_order_give_the_same_bytes(
    store: Store, given: dict[str, Any], vgg: Path, tmp_path: Path
) -> None:
    def scored(store: Store, cluster: Any) -> Artifact:
        return run(store, given, figures=["lpips", "ssim"], paths={"perceptual": vgg}, cluster=cluster)

    one, other = scored(store, InProcess()), scored(Store(tmp_path), Backwards())
    assert digests(one) == digests(other)
    assert set(one.files) == {"metrics.json"}
    assert {"ssim", "lpips", "psnr"} <= values(one).keys()


def test_lpips_without_its_weights_says_how_to_get_them(
    store: Store, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", fail)
    with pytest.raises(
        StorageError, match=r"is not on this machine and cannot be downloaded \(no network\)"
    ) as refusal:
        run(store, given, figures=["lpips"])
    assert "--perceptual FILE" in str(refusal.value.hint)
    assert "leave lpips out of figures" in str(refusal.value.hint)
    VGG16.cached.parent.mkdir(parents=True)
    VGG16.cached.write_bytes(b"something else")
    with pytest.raises(CorruptError, match="expected 397923af"):
        run(store, given, figures=["lpips"])


def test_a_file_without_vgg_is_refused(store: Store, given: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CorruptError, match="holds no VGG16"):
        run(store, given, figures=["lpips"], paths={"perceptual": tmp_path / "other.pth"})


def test_figures_of_pairs_need_pairs(store: Store, given: dict[str, Any]) -> None:
    described = run(store, given).inputs
    alone = {name: store.open(described[name]["stage"], described[name]["key"]) for name in ("features", "reference")}
    with pytest.raises(UsageError, match=r"measures ssim .* but reads neither images nor originals"):
        make(store, score, ScoreConfig.model_validate({**CONFIG, "figures": ["ssim"]}), Inputs(alone), {}, Options())


@pytest.mark.parametrize("filter", ["bilinear", "opencv-bilinear"])
def test_the_reference_is_seen_as_the_protocol_says(
    filter: str, store: Store, given: dict[str, Any], tmp_path: Path
) -> None:
    """Perfect reconstructions of a view have the largest PSNR only against the same view."""
    reference = index_folder(draw_folder(tmp_path, images=6, pixels=40), store.root)
    views = EvalCropViews(size=SIZE, filter=filter)  # type: ignore[arg-type]
    images = ImageSet.open(reference.path)
    seen = images.chosen_views(range(12), [0] * 12, views=views)
    perfect = {**given, "images": images_artifact(store, seen, images.labels, name=filter), "originals": reference}
    assert values(run(store, perfect, views=views))["psnr"] == 100
    assert values(run(store, perfect))["psnr"] < 60
    with pytest.raises(InputError, match=r"pixels a side, but classifier .* takes 16, views.size is 8"):
        run(store, perfect, views={"kind": "eval-crop", "size": 8})


@pytest.fixture(scope="module")
def inceptions() -> tuple[Any, Any]:
    """torch-fidelity's Inception and ours, with the same random weights."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(published.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        theirs = published.FeatureExtractorInceptionV3("theirs", INCEPTION_LAYERS)
        ours = PytorchFidExtractor("ours", INCEPTION_LAYERS)
    for parameter in theirs.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_pytorch_fids_input_is_all_that_differs(inceptions: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = inceptions
    bytes_B3HW = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 40, 40)).astype(np.uint8))
    found = ours(bytes_B3HW)
    assert not torch.allclose(found[0], theirs(bytes_B3HW)[0], rtol=1e-2)
    unit = F.interpolate(bytes_B3HW / 255, (299, 299), mode="bilinear", align_corners=False)
    as_tensorflow_wants = 128 * (2 * unit - 1) + 128  # theirs subtracts 128 and divides by it
    monkeypatch.setattr(
        published, "interpolate_bilinear_2d_like_tensorflow1x", lambda *args, **kwargs: as_tensorflow_wants
    )
    for mine, expected in zip(found, theirs(bytes_B3HW), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("extractor", "registered"), [("inception", "inception-v3-compat"), ("inception-pytorch-fid", PYTORCH_FID)]
)
def test_the_config_chooses_and_names_inceptions_input(extractor: str, registered: str) -> None:
    config = DescribeConfig.model_validate({"extractor": extractor})
    run = SimpleNamespace(device="cpu", paths={"weights": Path("inception.pth")})
    chosen, files = choose_extractors(config, Inputs({}), run)  # type: ignore[arg-type]
    assert [(one.id, REGISTERED[file.kind][0]) for one, file in zip(chosen, files, strict=True)] == [
        (f"{extractor}-6726825d", registered)
    ]
