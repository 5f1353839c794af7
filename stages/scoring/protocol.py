"""The protocol of a score: its settings, and what it needs of images, reference and judges before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.errors import InputError, UsageError
from pipeline.images import Views
from pipeline.images.views import CenterViews
from pipeline.keys import NEUTRAL
from pipeline.stage import Inputs
from stages.image_files import Pictures
from stages.networks import read_classifier_config

INCEPTION_FEATURES = 2048
OF_PAIRS = ("ssim", "lpips")
Figure = Literal["ssim", "lpips", "usage"]
Resize = Literal["torch-fidelity", "pytorch-fid"]


class ScoreConfig(Config):
    """The protocol. Figures of different protocols, and of different numbers of images, cannot be compared."""

    extractor: Literal["classifier", "inception"] = Field(
        default="classifier", description="whose features: the given classifiers' (mean over them), or Inception's"
    )
    size: int | None = Field(
        default=None, ge=8, description="pixels a side at which image sets are seen; left out: as the other images"
    )
    splits: int = Field(default=10, ge=1, description="splits of the Inception score; ADM uses images / 5000")
    shuffle: bool = Field(default=True, description="shuffle before splitting; ADM does not")
    subsets: int = Field(default=100, ge=1, description="subsets of the kernel distance")
    subset_size: int = Field(default=1000, ge=2, description="images per subset, at most what there is")
    neighbours: int = Field(default=3, ge=1, description="neighbours of precision and recall")
    pairs: bool = Field(default=False, description="images are reconstructions of the reference, in order: adds PSNR")
    figures: tuple[Figure, ...] = Field(
        default=(),
        strict=False,
        json_schema_extra=NEUTRAL,
        description="further figures: of pairs ssim and lpips (VGG16, needs weights); usage: share of the codebook that "
        "the token set (input tokens) uses",
    )
    views: Views | None = Field(
        default=None,
        json_schema_extra=NEUTRAL,
        description="how image sets are seen, by the upright view; null: ADM's centre crop at size",
    )
    inception_input: Resize = Field(
        default="torch-fidelity",
        json_schema_extra=NEUTRAL,
        description="how images become Inception's 299 pixels: as in TensorFlow (torch-fidelity, ADM), or as in pytorch-fid",
    )
    rows_per_pass: int = Field(default=64, ge=1, description="images that go through the extractor together")
    shard_images: int = Field(default=1024, ge=1, description="images per unit of work")

    @model_validator(mode="after")
    def _fits_itself(self) -> Self:
        lonely = [figure for figure in self.figures if figure in OF_PAIRS]
        if lonely and not self.pairs:
            raise ValueError(f"{lonely[0]} compares reconstructions with what they were made of: set pairs to true")
        return self

    @property
    def of_pairs(self) -> list[Figure]:
        """The figures that are measured image by image beside PSNR."""
        return [figure for figure in OF_PAIRS if figure in self.figures]

    def seen_at(self, size: int) -> Views:
        """The views under which image sets are seen."""
        return self.views or CenterViews(size=size)


def common_size(config: ScoreConfig, inputs: Inputs) -> int:
    """The size at which all images are seen: as configured, as decoded, or as the classifier wants them."""
    artifacts = [inputs[name] for name in ("images", "reference")]
    decoded = {int(artifact.facts["size"]) for artifact in artifacts if "size" in artifact.facts}
    judged = {read_classifier_config(judge).image_size for judge in inputs.all("classifiers")}
    asked = ({config.size} if config.size else set()) | ({config.views.size} if config.views else set())
    known = decoded | judged | asked
    if len(known) > 1:
        raise InputError(f"images, reference, classifiers and size must agree on pixels a side, found {sorted(known)}")
    if not known:
        raise UsageError("image sets alone have no common size: give size in the config")
    return known.pop()


def check_classes(images: Pictures, inputs: Inputs) -> None:
    """InputError for a judge that does not know the images' classes."""
    largest = int(images.labels_I.max(initial=0))
    for judge in inputs.all("classifiers"):
        classes = read_classifier_config(judge).classes
        if largest >= classes:
            raise InputError(
                f"{images.name} has class {largest}, but {judge.name} knows 0 to {classes - 1}", path=images.path
            )


def feature_counts(config: ScoreConfig, inputs: Inputs) -> list[int]:
    """Features of each extractor of the distances, at least one."""
    if config.extractor == "inception":
        return [INCEPTION_FEATURES]
    if not inputs.all("classifiers"):
        raise UsageError(
            "extractor: classifier needs at least one classifier",
            hint="give --classifiers, or set extractor to inception",
        )
    return [read_classifier_config(judge).features for judge in inputs.all("classifiers")]


def check_counts(config: ScoreConfig, images: int, reference: int, features: list[int]) -> None:
    """InputError where there are too few images for a figure to mean anything, with the number that is needed."""
    needs = {
        f"a Frechet distance on {max(features)} features": max(features),
        f"{config.splits} splits of the Inception score": config.splits,
        "the kernel distance": 2,
        f"precision and recall with {config.neighbours} neighbours": config.neighbours + 1,
    }
    for what, needed in needs.items():
        for name, found in (("images", images), ("reference", reference)):
            if found < needed:
                raise InputError(f"{what} needs at least {needed} images, but {name} has {found}")


def have_these_extractors(metrics: Mapping[str, Any], config: ScoreConfig, inputs: Inputs) -> bool:
    """Whether a score was made with these extractors; former scores name judges by the digests of their manifests."""
    former = [[judge.digest for judge in inputs.all("classifiers")]] if config.extractor == "classifier" else []
    return metrics.get("extractors") in [extractor_ids(config, inputs), *former]


def extractor_ids(config: ScoreConfig, inputs: Inputs) -> list[str]:
    """What tells one extractor of the distances from another."""
    if config.extractor == "inception":
        return ["inception-6726825d" + input_suffix(config)]
    return [judge.content for judge in inputs.all("classifiers")]


def input_suffix(config: ScoreConfig) -> str:
    """What a protocol's name says of Inception's input where it is not the usual one."""
    return "" if config.inception_input == "torch-fidelity" else f"-{config.inception_input}"
