"""Scoring: distances of features of images from those of a reference, and measurements per image.

The figures are torch-fidelity's. Features are artifacts (`describe-images`), so that a reference is extracted once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.artifact import Artifact
from pipeline.compatibility import Facts, Known, KnownInputs
from pipeline.config import Config
from pipeline.draft import Draft
from pipeline.errors import CorruptError, InputError, UsageError
from pipeline.keys import NEUTRAL, canonical_bytes
from pipeline.runtime import Runtime
from pipeline.shards import map_shards
from pipeline.stage import Inputs, read, stage
from smalti.tokens import TokenSet, open_tokens
from stages.codes.code_usage import CodeUsage
from stages.devices import threads
from stages.images.image_files import PicturesAt
from stages.scoring.comparison import ComparisonSpec, Nearness, Pairs, compare_shard, gather
from stages.scoring.describe_images import DescribeConfig
from stages.scoring.features import KIND, ImageFeatures
from stages.weights.identity import is_same_tokenizer
from stages.weights.perceptual import PERCEPTUAL, PERCEPTUAL_EXTERNAL
from stages.weights.places import VGG16

METRICS = "metrics.json"
FORMAT = 1
BLOCK_CODES = 2**22
OF_PAIRS = ("ssim", "lpips")
TRAINING = "training-features"
Figure = Literal["ssim", "lpips", "usage"]


class ScoreConfig(Config):
    """The measured figures. Figures with other settings or other numbers of images cannot be compared."""

    splits: int = Field(default=10, ge=1, description="splits of the Inception score; ADM uses images / 5000")
    shuffle: bool = Field(default=True, description="shuffle before splitting; ADM does not")
    subsets: int = Field(default=100, ge=1, description="subsets of the kernel distance")
    subset_size: int = Field(default=1000, ge=2, description="images per subset, at most what there is")
    neighbours: int = Field(default=3, ge=1, description="neighbours of precision and recall")
    figures: tuple[Figure, ...] = Field(
        default=(),
        strict=False,
        json_schema_extra=NEUTRAL,
        description="further figures: of pairs (inputs images and originals) ssim and lpips (VGG16, needs weights); usage: "
        "share of the codebook that the token set (input tokens) uses",
    )
    rows_per_pass: int = Field(default=64, ge=1, description="pairs that go through LPIPS together")
    shard_images: int = Field(default=1024, ge=1, description="images per unit of work")


def foresee(config: ScoreConfig, inputs: KnownInputs) -> Facts:
    """Which score it will be; a refusal where features, reference, images and the best score do not belong together."""
    features, reference = inputs["features"], inputs["reference"]
    problem = _lack(config, inputs)
    if problem:
        raise inputs.refusal(problem)
    for one in (features, *inputs.all(TRAINING)):
        if "described" in one.facts and "described" in reference.facts:
            differing = one.facts["described"].contradiction(reference.facts["described"])
            if differing:
                raise inputs.refusal(
                    f"cannot compare features: {one.name} describes {differing[0]}, but {reference.name} {differing[1]}"
                )
    for known in (features, reference):
        for what, needed in needed_images(config, known.get("dims", 1)).items():
            if known.get("images", needed) < needed:
                raise inputs.refusal(
                    f"measures {what}, which needs at least {needed} images, but {known.name} has {known.get('images')}"
                )
    _check_known_pairs(features, reference, inputs)
    if "training" in inputs:
        inputs.agree([inputs["tokens"], inputs["training"]], "tokenizer", "codes", "grid")
        decoded = features.facts.get("decoded")
        if decoded is not None and decoded.differs(inputs["tokens"].origin):
            raise inputs.refusal(
                f"looks for copies in the codes of {inputs['tokens'].name} (tokens), but {features.name} describes "
                f"images of those of {decoded}"
            )
    for best in inputs.all("best"):
        _check_known_best(reference, best, inputs)
    return {"scored": reference.origin}


def _lack(config: ScoreConfig, inputs: KnownInputs | Inputs) -> str | None:
    """Raise for a figure whose inputs are missing."""
    lonely = [name for name in config.figures if name in OF_PAIRS]
    if ("images" in inputs) != ("originals" in inputs):
        return "compares reconstructions (images) with what they were made of (originals), but reads only one of them"
    if lonely and "images" not in inputs:
        return f"measures {lonely[0]} (figures) of reconstructions, but reads neither images nor originals"
    if "usage" in config.figures and "tokens" not in inputs:
        return "measures the usage of the codebook (figures), but reads no tokens"
    given = [name for name in ("tokens", "training") if name in inputs]
    if len(given) == 1 and "usage" not in config.figures:
        return f"looks for copies with the inputs tokens and training, but reads only {given[0]}"
    return None


def _check_known_pairs(features: Known, reference: Known, inputs: KnownInputs) -> None:
    """Reconstructions are those of the reference, and both are what the features describe."""
    if "images" not in inputs:
        return
    for described, name in ((features, "images"), (reference, "originals")):
        shown = described.facts.get("shows")
        if shown is not None and shown.differs(inputs[name].origin):
            raise inputs.refusal(f"reads {inputs[name].name} as {name}, but {described.name} describes {shown}")
    if "listed" in features.facts and features.facts["listed"] is None:
        raise inputs.refusal(f"compares pairs, but {features.name} describes samples, not reconstructions")
    inputs.agree([features, reference], "listed", "images")


def _check_known_best(reference: Known, best: Known, inputs: KnownInputs) -> None:
    """The best score has the reference of this one, and so its extractors and settings."""
    scored = best.get("scored")
    if scored is None:
        if best.artifact is None:
            raise inputs.refusal(f"reads {best.name} as the best score, but it measures something else")
    elif reference.origin.differs(scored):
        raise inputs.refusal(f"scores against {reference.name}, but its best score {best.name} scores against {scored}")


def needed_images(config: ScoreConfig, features: int) -> dict[str, int]:
    """Least number of images of each figure, by its name. features: the largest number of an extractor."""
    return {
        f"a Frechet distance on {features} features": features,
        f"{config.splits} splits of the Inception score": config.splits,
        "the kernel distance": 2,
        f"precision and recall with {config.neighbours} neighbours": config.neighbours + 1,
    }


@stage(
    "score",
    version=3,
    config=ScoreConfig,
    reads={
        "features": read(KIND, help="features of what is scored: samples, or reconstructions"),
        "reference": read(KIND, help="features of the real images, best held-out ones, or published statistics"),
        "best": read("metrics", help="the same score of real against real images", optional=True),
        "tokens": read(
            "token-set", help="the images' codes: to look for copies in, or for the codebook's usage", optional=True
        ),
        "training": read("token-set", help="the codes that the generator was trained on", optional=True),
        TRAINING: read(KIND, help="features of training images, for signs of memory", optional=True),
        "images": read(
            "images", "image-set", help="reconstructions, to be compared with their originals", optional=True
        ),
        "originals": read("image-set", "images", help="what the reconstructions were made of", optional=True),
    },
    writes="metrics",
    example="smalti score --features digits/rar/image-features --reference digits/rar/reference",
    externals={
        PERCEPTUAL: replace(
            PERCEPTUAL_EXTERNAL,
            place=lambda config: VGG16 if "lpips" in config.figures else None,
            otherwise="leave lpips out of figures",
        ),
    },
    foresees=foresee,
)
def score_images(config: ScoreConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Score images by their features against those of a reference.

    Writes metrics.json: Frechet distance (FID with Inception), Inception score, kernel distance, precision and recall;
    with classifiers also class consistency; PSNR of reconstructions, if asked for also SSIM and LPIPS, and how much of
    the codebook their codes use; the share of samples that copy a training image; and how many times the best possible
    distance this is.
    """
    from threadpoolctl import threadpool_limits

    problem = _lack(config, inputs)
    if problem:
        raise UsageError(f"score {problem}")
    features, reference = (ImageFeatures(inputs[name]) for name in ("features", "reference"))
    check_features(config, inputs, features, reference)
    check_pairs(inputs, features, reference)
    if "best" in inputs:
        check_best(inputs["best"], reference)
    spec = plan_comparison(config, inputs, features, reference, run)
    if spec.blocks:
        map_shards(out, run, compare_shard, spec, spec.sizes, label="compare")
    with threads(1), threadpool_limits(1):  # the last bits of a figure depend on the number of threads
        metrics = measure(config, inputs, spec, out, features, reference)
    out.put("metrics", {METRICS: canonical_bytes(metrics) + b"\n"})
    out.facts = {name: metrics[name] for name in ("protocol", "images", "values")}
    out.figure = sentence(metrics["values"])


def check_features(config: ScoreConfig, inputs: Inputs, features: ImageFeatures, reference: ImageFeatures) -> None:
    """CorruptError for features that cannot be compared, InputError where there are too few for a figure."""
    for one in (features, *map(ImageFeatures, inputs.all(TRAINING))):
        differing = one.description.contradiction(reference.description)
        if differing:
            raise CorruptError(
                f"{one.name} describes images {differing[0]}, but {reference.name} {differing[1]}",
                path=one.path,
                hint="describe both in the same way (smalti describe-images)",
            )
        if TRAINING in inputs and None in (one.images, reference.images):
            raise InputError("nearness to training images needs features of images, found published statistics")
    most = max(one.features for one in features.of_distances)
    for what, needed in needed_images(config, most).items():
        for name, one in (("features", features), ("reference", reference)):
            if one.images is not None and one.images < needed:
                raise InputError(f"{what} needs at least {needed} images, but {name} has {one.images}")


def check_pairs(inputs: Inputs, features: ImageFeatures, reference: ImageFeatures) -> None:
    """InputError unless images and originals are what the features describe, as many and of the same labels."""
    if "images" not in inputs:
        return
    for described, name in ((features, "images"), (reference, "originals")):
        if not described.is_of(inputs[name]):
            raise InputError(
                f"{described.name} describes other images than {inputs[name].name} ({name})", path=described.path
            )
    if features.images != reference.images or (features.read("labels") != reference.read("labels")).any():
        raise InputError(
            f"{inputs['images'].name} is not a reconstruction of {inputs['originals'].name}, whose number or labels differ",
            path=inputs["images"].path,
        )


def check_best(best: Artifact, reference: ImageFeatures) -> None:
    """InputError unless the best score has the reference of this one, and so its extractors and settings."""
    read_metrics(best)
    against = best.inputs["reference"]
    if against["digest"] not in (reference.artifact.content, reference.artifact.digest):
        raise InputError(
            f"{best.name} was not scored against {reference.name}, and cannot be the best one beside it",
            path=best.path,
            hint="score the best possible images against the same reference",
        )


def plan_comparison(
    config: ScoreConfig, inputs: Inputs, features: ImageFeatures, reference: ImageFeatures, run: Runtime
) -> ComparisonSpec:
    """Pairs and nearness, as far as their inputs were given, cut into blocks."""
    parts: list[tuple[Pairs | Nearness, int]] = []
    if "images" in inputs:
        views = DescribeConfig.model_validate_json(canonical_bytes(reference.artifact.config)).views
        images, originals = (
            PicturesAt.of(inputs[name], size=reference.artifact.facts["size"], views=views)
            for name in ("images", "originals")
        )
        perceptual = run.paths[PERCEPTUAL].absolute() if "lpips" in config.figures else None
        parts.append((Pairs(images, originals, config.figures, config.rows_per_pass, perceptual), features.images or 0))
    if TRAINING in inputs:
        training = ImageFeatures(inputs[TRAINING])
        folders = [one.path.absolute() / "thumbnails" for one in (features, reference, training)]
        parts.append((Nearness(tuple(folders[:2]), folders[2]), training.images or 0))
    step = config.shard_images
    blocks = [
        (number, start, min(start + step, rows))
        for number, (_, rows) in enumerate(parts)
        for start in range(0, rows, step)
    ]
    return ComparisonSpec(tuple(part for part, _ in parts), tuple(blocks), run.device)


def measure(
    config: ScoreConfig,
    inputs: Inputs,
    spec: ComparisonSpec,
    out: Draft,
    features: ImageFeatures,
    reference: ImageFeatures,
) -> dict[str, Any]:
    """metrics.json: the protocol, the figures of each extractor, and their means as `values`."""
    from stages.scoring.figures import consistency, distances, rounded

    each = [
        distances(
            features.extracted(number),
            reference.extracted(number),
            splits=config.splits,
            shuffle=config.shuffle,
            subsets=config.subsets,
            subset_size=config.subset_size,
            neighbours=config.neighbours,
        )
        for number in range(len(features.of_distances))
    ]
    if "best" in inputs:
        add_ratios(each, read_metrics(inputs["best"]))
    shares = [
        {"consistency": consistency(features.read(f"logits-{number}"), features.read("labels"))}
        for number, one in enumerate(features.extractors)
        if one.kind == "classifier"
    ]
    values = {
        **mean(each),
        **mean(shares),
        **measure_blocks(spec, out, features),
        **measure_usage(config, inputs),
        **find_copies(inputs),
    }
    first = features.extractors[0]
    return {
        "format": FORMAT,
        "protocol": f"{first.kind}-{first.features}",
        "images": features.images,
        "reference": reference.images,
        "extractors": [one.id for one in features.of_distances],
        "each": [{name: rounded(value) for name, value in figures.items()} for figures in each],
        "judges": [{name: rounded(value) for name, value in figures.items()} for figures in shares],
        "values": {name: rounded(value) for name, value in values.items()},
    }


def add_ratios(each: list[dict[str, float]], best: dict[str, Any]) -> None:
    """To each extractor's figures: its distance as a multiple of the best possible one under the same extractor."""
    for figures, ideal in zip(each, best["each"], strict=True):
        figures["ratio"] = figures["distance"] / ideal["distance"]


def measure_blocks(spec: ComparisonSpec, out: Draft, features: ImageFeatures) -> dict[str, float]:
    """Means over pairs, and nearness to training images, of what the shards measured."""
    from stages.scoring.figures import nearness

    found: dict[str, float] = {}
    for number, part in enumerate(spec.parts):
        blocks = gather(spec, out, number)
        if isinstance(part, Pairs):
            names = ("psnr", *(name for name in OF_PAIRS if name in part.figures))
            found |= {name: float(np.concatenate([block[name] for block in blocks]).mean()) for name in names}
        else:
            distances = np.sqrt(np.minimum.reduce([block["nearest"] for block in blocks]).astype(np.float64))
            found |= nearness(distances[: features.images], distances[features.images :])
    return found


def measure_usage(config: ScoreConfig, inputs: Inputs) -> dict[str, float]:
    """The share of the codebook that the token set uses, and its perplexity, where they were asked for."""
    if "usage" not in config.figures:
        return {}
    tokens = open_tokens(inputs["tokens"].path)
    usage = CodeUsage(tokens.codes)
    for start in range(0, tokens.n_images, config.shard_images):
        usage.add(tokens.tokens.read_rows(start, min(start + config.shard_images, tokens.n_images)))
    return {"usage": usage.used / tokens.codes, "perplexity": usage.perplexity}


def find_copies(inputs: Inputs) -> dict[str, float]:
    """The share of samples whose codes are exactly those of a training image, where both token sets were given."""
    from stages.scoring.figures import copies

    if "training" not in inputs:
        return {}
    ours, training = (open_tokens(inputs[name].path) for name in ("tokens", "training"))
    if not is_same_tokenizer(ours.attributes.tokenizer, training.attributes.tokenizer) or ours.grid != training.grid:
        raise CorruptError(
            f"{inputs['tokens'].name} and {inputs['training'].name} hold codes of different tokenizers or grids",
            path=ours.path,
        )
    return {"copies": copies(np.concatenate(list(blocks_of(ours))), blocks_of(training))}


def sentence(values: Mapping[str, float]) -> str:
    """The main figures in one line, for the run's table."""
    parts = [f"PSNR {values['psnr']:.1f} dB"] if "psnr" in values else []
    parts += [f"SSIM {values['ssim']:.3f}"] if "ssim" in values else []
    parts += [f"LPIPS {values['lpips']:.3f}"] if "lpips" in values else []
    ratio = f" = {values['ratio']:.2f} x best possible" if "ratio" in values else ""
    parts.append(f"distance {values['distance']:.4g}{ratio}")
    parts += [f"consistency {values['consistency']:.1%}"] if "consistency" in values else []
    parts += [f"{values['usage']:.0%} of the codes used"] if "usage" in values else []
    parts += [f"{values['copies']:.1%} copies"] if "copies" in values else []
    return ", ".join(parts)


def read_metrics(artifact: Artifact) -> dict[str, Any]:
    """metrics.json of a score; InputError if this artifact is the metrics of something else."""
    metrics = json.loads(artifact.file(METRICS).read_bytes())
    if metrics.get("format") != FORMAT or "each" not in metrics:
        raise InputError(f"{artifact.name} holds no score", path=artifact.path)
    return dict(metrics)


def mean(each: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each figure over extractors, summed in their order."""
    return {name: sum(figures[name] for figures in each) / len(each) for name in (each[0] if each else {})}


def blocks_of(token_set: TokenSet) -> Iterator[NDArray[Any]]:
    """All rows of codes, in blocks (R, T) of about `BLOCK_CODES` codes."""
    images = max(1, BLOCK_CODES // (token_set.n_crops * token_set.attributes.tokens))
    for start in range(0, token_set.n_images, images):
        block_ICT = token_set.tokens.read_rows(start, min(start + images, token_set.n_images))
        yield block_ICT.reshape(-1, block_ICT.shape[-1])
