"""The protocol of a score: its settings, and what it needs of images, reference and judges before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.compatibility import Facts, Known, KnownInputs
from pipeline.config import Config
from pipeline.errors import InputError, UsageError
from pipeline.images import Views
from pipeline.keys import NEUTRAL
from pipeline.stage import Inputs
from smalti.counting import counted
from stages.images.image_files import Pictures
from stages.weights.networks import NetworkFile, read_classifier_config

CLASSIFIER, INCEPTION = "smalti-classifier", "inception-v3-compat"  # names in torch-fidelity's registry
PYTORCH_FID = "smalti-inception-pytorch-fid"
INCEPTION_FEATURES = 2048
SEEN = ("images", "reference", "training-images")
OF_PAIRS = ("ssim", "lpips")
Figure = Literal["ssim", "lpips", "usage"]
Resize = Literal["torch-fidelity", "pytorch-fid"]


@dataclass(frozen=True)
class ExtractorFile:
    """Which extractor, with which weights, on which device; picklable."""

    name: str
    device: str
    classifier: NetworkFile | None = None
    weights: Path | None = None


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


def foresee(config: ScoreConfig, inputs: KnownInputs) -> Facts:
    """Which score it will be; a refusal where images, reference, judges and the best score do not belong together."""
    images, reference, judges = inputs["images"], inputs["reference"], inputs.all("classifiers")
    if config.extractor == "classifier" and not judges:
        raise inputs.refusal(
            "scores by classifiers (extractor), but reads none: give classifiers, or extractor: inception"
        )
    _check_given(config, inputs)
    size = _foreseen_size(config, inputs)
    _check_known_classes(images, judges, inputs)
    _check_known_counts(config, inputs)
    _check_known_pairs(config, inputs)
    if "training" in inputs:
        inputs.agree([inputs["tokens"], inputs["training"]], "tokenizer", "codes", "grid")
        _check_known_copies(images, inputs["tokens"], inputs)
    extractors = [judge.origin for judge in judges] if config.extractor == "classifier" else []
    scored = {"reference": reference.origin, "extractors": extractors, "protocol": protocol_of(config), "size": size}
    for best in inputs.all("best"):
        _check_known_best(scored, best, inputs)
    return {"scored": scored}


def protocol_of(config: ScoreConfig) -> dict[str, Any]:
    """The settings on which a distance depends besides images, reference, judges and size."""
    views = None if config.views is None else config.views.model_dump(mode="json")
    return {"extractor": config.extractor, "inception_input": config.inception_input, "views": views}


def _check_given(config: ScoreConfig, inputs: KnownInputs) -> None:
    """Figures have the inputs that they are made of."""
    if "usage" in config.figures and "tokens" not in inputs:
        raise inputs.refusal("measures the usage of the codebook (figures), but reads no tokens")
    given = [name for name in ("tokens", "training") if name in inputs]
    if len(given) == 1 and "usage" not in config.figures:
        raise inputs.refusal(f"looks for copies with the inputs tokens and training, but reads only {given[0]}")


def _foreseen_size(config: ScoreConfig, inputs: KnownInputs) -> int | None:
    """The size at which all images are seen, if it is known yet; a refusal where two inputs have different ones."""
    decoded = [one for name in SEEN for one in inputs.all(name) if one.kind == "images"]
    sized = [*decoded, *inputs.all("classifiers")]
    sizes = [(one.get("pixels"), f"images of {one.get('pixels')} pixels in {one.name}") for one in decoded]
    sizes += [(one.get("pixels"), f"{one.name} judges {one.get('pixels')} pixels") for one in inputs.all("classifiers")]
    sizes += [(config.size, f"size is {config.size}")]
    sizes += [(config.views.size, f"views.size is {config.views.size}")] if config.views else []
    known = [(pixels, words) for pixels, words in sizes if pixels is not None]
    for pixels, words in known:
        if pixels != known[0][0]:
            raise inputs.refusal(f"compares images of different sizes: {known[0][1]}, but {words}")
    if not known and not sized:
        raise inputs.refusal("reads image sets alone, which have no common size: set size")
    return known[0][0] if known else None


def _check_known_copies(images: Known, tokens: Known, inputs: KnownInputs) -> None:
    """Copies are looked for among the codes that the images show."""
    decoded = images.facts.get("decoded")
    if decoded is not None and decoded.differs(tokens.origin):
        raise inputs.refusal(
            f"looks for copies in the codes of {tokens.name} (tokens), but {images.name} shows those of {decoded}"
        )


def _check_known_classes(images: Known, judges: list[Known], inputs: KnownInputs) -> None:
    """Every judge knows all classes of the images."""
    classes = images.get("labels", images.get("classes", 0))
    for judge in judges:
        if classes > judge.get("classes", classes):
            raise inputs.refusal(
                f"scores images of {counted(classes, 'class')} ({images.name}), but {judge.name} judges {judge.get('classes')} classes"
            )


def _check_known_counts(config: ScoreConfig, inputs: KnownInputs) -> None:
    """There are enough images for each figure."""
    of_judges = [judge.get("features", 1) for judge in inputs.all("classifiers")]
    features = [INCEPTION_FEATURES] if config.extractor == "inception" else of_judges
    for known in (inputs["images"], inputs["reference"]):
        for what, needed in needed_images(config, features).items():
            if known.get("images", needed) < needed:
                raise inputs.refusal(
                    f"measures {what}, which needs at least {needed} images, but {known.name} has {known.get('images')}"
                )


def _check_known_pairs(config: ScoreConfig, inputs: KnownInputs) -> None:
    """Reconstructions are those of the reference."""
    if not config.pairs:
        return
    images, reference = inputs["images"], inputs["reference"]
    if "listed" in images.facts and images.facts["listed"] is None:
        raise inputs.refusal(f"compares pairs (pairs: true), but {images.name} holds samples, not reconstructions")
    inputs.agree([images, reference], "listed", "images")


def _check_known_best(scored: Mapping[str, Any], best: Known, inputs: KnownInputs) -> None:
    """The best score has the reference, the judges, the protocol and the size of this one."""
    ideal = best.get("scored")
    if ideal is None:
        if best.artifact is None:
            raise inputs.refusal(f"reads {best.name} as the best score, but it measures something else")
        return
    told = f"scores against {{}}, but its best score {best.name} {{}}"
    if scored["reference"].differs(ideal["reference"]):
        raise inputs.refusal(told.format(scored["reference"], f"scores against {ideal['reference']}"))
    ours, theirs = scored["extractors"], ideal["extractors"]
    if len(ours) != len(theirs) or any(one.differs(other) for one, other in zip(ours, theirs, strict=True)):
        names = [", ".join(map(str, some)) or "inception" for some in (ours, theirs)]
        raise inputs.refusal(f"scores by {names[0]}, but its best score {best.name} scores by {names[1]}")
    for name in ("protocol", "size"):
        if None not in (scored[name], ideal[name]) and scored[name] != ideal[name]:
            raise inputs.refusal(
                f"scores with {name} {scored[name]}, but its best score {best.name} with {name} {ideal[name]}"
            )


def common_size(config: ScoreConfig, inputs: Inputs) -> int:
    """The size at which all images are seen: as configured, as decoded, or as the classifier wants them."""
    sizes = known_sizes(config, inputs)
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{what} {pixels}" for what, pixels in sizes.items())
        raise InputError(f"images, reference, classifiers and size must agree on pixels a side, but {said}")
    if not sizes:
        raise UsageError("image sets alone have no common size: give size in the config")
    return next(iter(sizes.values()))


def known_sizes(config: ScoreConfig, inputs: Inputs) -> dict[str, int]:
    """What says how many pixels a side the images have -> how many. An image set says nothing of it."""
    artifacts = {name: inputs[name] for name in ("images", "reference")}
    decoded = {
        f"{name} ({artifact.name}) has": int(artifact.facts["size"])
        for name, artifact in artifacts.items()
        if "size" in artifact.facts
    }
    judged = {
        f"classifier {judge.name} takes": read_classifier_config(judge).pixels for judge in inputs.all("classifiers")
    }
    asked = {"size is": config.size} if config.size else {}
    return decoded | judged | asked | ({"views.size is": config.views.size} if config.views else {})


def check_classes(images: Pictures, inputs: Inputs) -> None:
    """InputError for a judge that does not know the images' classes."""
    largest = int(images.labels_I.max(initial=0))
    for judge in inputs.all("classifiers"):
        classes = read_classifier_config(judge).outputs
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


def needed_images(config: ScoreConfig, features: list[int]) -> dict[str, int]:
    """How many images each figure needs at least, by its name."""
    return {
        f"a Frechet distance on {max(features)} features": max(features),
        f"{config.splits} splits of the Inception score": config.splits,
        "the kernel distance": 2,
        f"precision and recall with {config.neighbours} neighbours": config.neighbours + 1,
    }


def check_counts(config: ScoreConfig, images: int, reference: int, features: list[int]) -> None:
    """InputError where there are too few images for a figure to mean anything, with the number that is needed."""
    for what, needed in needed_images(config, features).items():
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
