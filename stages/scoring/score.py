"""Scoring: how far images are from a reference, by the features of a classifier or of Inception.

Features are computed shard by shard in passes of fixed size and kept in the draft until the figures are made, so a long
extraction survives interruptions and can be spread over workers. The figures themselves are torch-fidelity's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifact import Artifact
from pipeline.draft import Draft
from pipeline.errors import CorruptError, InputError, UsageError
from pipeline.keys import canonical_bytes
from pipeline.runtime import Runtime
from pipeline.shards import map_shards
from pipeline.stage import External, Inputs, read, stage
from smalti.tokens import TokenSet, open_tokens
from stages.codes.code_usage import CodeUsage
from stages.devices import threads
from stages.images.image_files import Pictures, open_pictures
from stages.scoring.extraction import (
    ExtractionSpec,
    Source,
    choose_extractors,
    extract_shard,
    gather,
    gather_nearness,
    gather_pairs,
)
from stages.scoring.protocol import (
    SEEN,
    ScoreConfig,
    check_classes,
    check_counts,
    common_size,
    extractor_ids,
    feature_counts,
    foresee,
    have_these_extractors,
    input_suffix,
    protocol_of,
)
from stages.weights.checkpoint_reader import identify_file
from stages.weights.identity import is_same_tokenizer
from stages.weights.perceptual import PERCEPTUAL, PERCEPTUAL_EXTERNAL
from stages.weights.places import INCEPTION, VGG16

METRICS = "metrics.json"
FORMAT = 1
BLOCK_CODES = 2**22


@stage(
    "score",
    version=2,
    config=ScoreConfig,
    reads={
        "images": read("images", "image-set", help="what to score: samples, or reconstructions (pairs)"),
        "reference": read("image-set", "images", help="the real images, best held-out ones"),
        "classifiers": read(
            "classifier", help="judges: extractors, and of class consistency", optional=True, many=True
        ),
        "best": read("metrics", help="the same score of real against real images", optional=True),
        "tokens": read(
            "token-set", help="the images' codes: to look for copies in, or for the codebook's usage", optional=True
        ),
        "training": read("token-set", help="the codes that the generator was trained on", optional=True),
        "training-images": read("image-set", "images", help="training images, for signs of memory", optional=True),
    },
    writes="metrics",
    example="smalti score --images digits/rar/images --reference digits/rar/held-out-images --classifiers digits/rar/judge-1",
    externals={
        "weights": External(
            help="the published Inception weights (with extractor: inception), if they are not in torch's cache",
            identify=lambda config, path: identify_inception(path),
            needed=lambda config: False,
            place=lambda config: INCEPTION if config.extractor == "inception" else None,
            otherwise="score by the features of classifiers: set extractor to classifier, with the input classifiers",
            usual=(INCEPTION,),
            is_file=True,
        ),
        PERCEPTUAL: replace(
            PERCEPTUAL_EXTERNAL,
            place=lambda config: VGG16 if "lpips" in config.figures else None,
            otherwise="leave lpips out of figures",
        ),
    },
    foresees=foresee,
)
def score_images(config: ScoreConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Score images against a reference.

    Writes metrics.json: Frechet distance (FID with Inception), Inception score, kernel distance, precision and recall;
    with classifiers also class consistency; PSNR of reconstructions, if asked for also SSIM and LPIPS, and how much of
    the codebook their codes use; the share of samples that copy a training image; and how many times the best possible
    distance this is.
    """
    from threadpoolctl import threadpool_limits

    size = common_size(config, inputs)
    images, reference = (open_pictures(inputs[name], size=size, views=config.views) for name in ("images", "reference"))
    check_classes(images, inputs)
    check_counts(config, len(images), len(reference), feature_counts(config, inputs))
    check_inputs(config, inputs, images, reference)
    if "best" in inputs:
        check_best(config, inputs, size)
    perceptual = run.paths[PERCEPTUAL].absolute() if "lpips" in config.figures else None
    extractors = choose_extractors(config, inputs, run)
    seen = [inputs[name] for name in SEEN if name in inputs]
    counts = tuple(len(open_pictures(one, size=size, views=config.views)) for one in seen)
    sources = tuple(map(Source.of, seen))
    spec = ExtractionSpec(extractors, sources, counts, size, config, out.path.absolute(), run.device, perceptual)
    sizes = [stop - start for _, _, start, stop in spec.blocks]
    later = len(spec.shards_of(spec.nearness, 2))  # these shards read what others wrote
    map_shards(out, run, extract_shard, spec, sizes[: len(sizes) - later], label="score")
    if later:
        map_shards(out, run, extract_shard, spec, sizes, label="nearness")
    with threads(1), threadpool_limits(1):  # the last bits of a figure depend on the number of threads
        metrics = measure(config, inputs, spec, out, images, reference)
    out.put("metrics", {METRICS: canonical_bytes(metrics) + b"\n"})
    out.facts = {
        "protocol": metrics["protocol"],
        "images": len(images),
        "values": metrics["values"],
    }
    out.figure = sentence(metrics["values"])


def identify_inception(path: Path) -> str:
    """SHA-256 of the published Inception weights; CorruptError for any other file."""
    digest = identify_file(path)
    INCEPTION.check_digest(digest, path)
    return digest


def check_inputs(config: ScoreConfig, inputs: Inputs, images: Pictures, reference: Pictures) -> None:
    """What was asked for has what it needs: UsageError or InputError before anything is computed."""
    if config.pairs and (len(images) != len(reference) or (images.labels_I != reference.labels_I).any()):
        raise InputError(
            f"pairs: {images.name} is no reconstruction of {reference.name}, whose number or labels differ",
            path=images.path,
        )
    if "usage" in config.figures and "tokens" not in inputs:
        raise UsageError("the figure usage is counted in a token set: give --tokens", hint="or leave it out of figures")
    given = [name for name in ("tokens", "training") if name in inputs]
    if len(given) == 1 and "usage" not in config.figures:
        raise UsageError(f"copies are looked for with the inputs tokens and training, found only {given[0]}")


def measure(
    config: ScoreConfig, inputs: Inputs, spec: ExtractionSpec, out: Draft, images: Pictures, reference: Pictures
) -> dict[str, Any]:
    """metrics.json: the protocol, the figures of each extractor, and their means as `values`."""
    from stages.scoring.figures import consistency, distances, rounded

    features = gather(spec, out)
    judges = len(inputs.all("classifiers"))
    each = [
        distances(
            *pair,
            splits=config.splits,
            shuffle=config.shuffle,
            subsets=config.subsets,
            subset_size=config.subset_size,
            neighbours=config.neighbours,
        )
        for pair in (features if config.extractor == "classifier" else features[:1])
    ]
    if "best" in inputs:
        add_ratios(each, read_metrics(inputs["best"]))
    shares = [
        {"consistency": consistency(ours.logits_NL, images.labels_I)} for ours, _ in features[len(features) - judges :]
    ]
    values = {
        **mean(each),
        **mean(shares),
        **compare_pixels(config, images, reference),
        **gather_pairs(spec, out),
        **gather_nearness(spec, out),
        **measure_usage(config, inputs),
        **find_copies(inputs),
    }
    return {
        "format": FORMAT,
        "protocol": f"{config.extractor}-{features[0][0].features_NE.shape[1]}{input_suffix(config)}",
        "images": len(images),
        "reference": len(reference),
        "extractors": extractor_ids(config, inputs),
        "each": [{name: rounded(value) for name, value in figures.items()} for figures in each],
        "judges": [{name: rounded(value) for name, value in figures.items()} for figures in shares],
        "values": {name: rounded(value) for name, value in values.items()},
    }


def check_best(config: ScoreConfig, inputs: Inputs, size: int) -> None:
    """InputError unless the best score has the reference, the judges and the protocol of this one."""
    best, reference = inputs["best"], inputs["reference"]
    metrics = read_metrics(best)
    before = ScoreConfig.model_validate_json(json.dumps(best.config))
    asked = before.size or (before.views and before.views.size) or size
    against = best.inputs["reference"]
    differing = {
        "classifiers": not have_these_extractors(metrics, config, inputs),
        "settings": protocol_of(before) != protocol_of(config),
        "size": asked != size,
        "reference": against["digest"] not in (reference.content, reference.digest),
    }
    for name, differs in differing.items():
        if differs:
            raise InputError(
                f"{best.name} was not scored with the {name} of this score, and cannot be the best one beside it",
                path=best.path,
                hint="score the best possible images with the same classifiers, reference, settings and size",
            )


def add_ratios(each: list[dict[str, float]], best: dict[str, Any]) -> None:
    """To each extractor's figures: its distance as a multiple of the best possible one under the same extractor."""
    for figures, ideal in zip(each, best["each"], strict=True):
        figures["ratio"] = figures["distance"] / ideal["distance"]


def compare_pixels(config: ScoreConfig, images: Pictures, reference: Pictures) -> dict[str, float]:
    """PSNR of reconstructions, where it was asked for."""
    from stages.scoring.figures import mean_psnr

    if not config.pairs:
        return {}
    blocks = zip(images.passes(config.shard_images), reference.passes(config.shard_images), strict=True)
    sums = [mean_psnr(ours, theirs) * len(ours) for (_, ours), (_, theirs) in blocks]
    return {"psnr": sum(sums) / len(images)}


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
    """The main figures as they stand in the run's table."""
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
