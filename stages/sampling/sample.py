"""Sampling: a generator lays new codes for given classes, shard by shard.

A sample's random numbers belong to (seed, sample id, step) alone, and the id is its row in the token set; a pass has
always the same number of rows. So workers, retries and interruptions leave no trace in the codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifact import Artifact
from pipeline.compatibility import Facts, KnownInputs
from pipeline.draft import Draft
from pipeline.errors import NumericError, UsageError
from pipeline.keys import config_value
from pipeline.runtime import Runtime
from pipeline.shards import map_shards
from pipeline.stage import Inputs, read, stage
from pipeline.stage_cache import cached
from smalti.attributes import TokenAttributes
from smalti.counting import counted
from smalti.tokens import open_tokens
from stages.codes.classes import check_labels, check_sampling, model_of, names_of_generator, shape_of
from stages.codes.token_files import TokenLayout, write_labels_and_cards
from stages.devices import Precision, products, threads
from stages.sampling.config import SampleConfig
from stages.sampling.pass_rows import propose_rows
from stages.weights.cards import GeneratorCard, TokenizerCard, read_card
from stages.weights.networks import NetworkFile, load_generator

LABELS = "labels"
TOKENIZER = "tokenizer"
KEY_DIGITS = 6

Labels_I = NDArray[np.int32]


def foresee(config: SampleConfig, inputs: KnownInputs) -> Facts:
    """Codes of the generator's tokenizer, for labels among its classes."""
    generator, tokenizers, like = inputs["generator"], inputs.all(TOKENIZER), inputs.all(LABELS)
    if any(one.kind == "codebook" for one in tokenizers):
        raise inputs.refusal(f"decodes with {tokenizers[0].name}, which makes a K-Means codebook and has no decoder")
    facts = generator.only("codes", "grid", "classes", "class_names", "factors", "pixels", "tokenizer")
    facts |= inputs.agree([generator, *tokenizers], "tokenizer", "codes")
    if tokenizers and tokenizers[0].get("downsample") and facts.get("grid"):
        facts["pixels"] = min(facts["grid"]) * tokenizers[0].facts["downsample"]
    classes = facts.get("classes")
    if (config.labels == "like") != bool(like):
        raise inputs.refusal(
            "has labels: like, but reads no token set as labels"
            if not like
            else f"reads the labels of {like[0].name}, but has labels: {config.labels}; set labels: like"
        )
    if like and config.classes is not None:
        raise inputs.refusal("has both classes and labels: like, which both choose the labels; give one of them")
    if like and classes is not None and like[0].get("labels", like[0].get("classes", 0)) > classes:
        raise inputs.refusal(
            f"takes the labels of {like[0].name}, which has {like[0].get('classes')} classes, but {generator.name} knows "
            f"{classes}"
        )
    check_labels(config.classes, classes, inputs)
    if model := model_of(generator):
        try:
            check_sampling(config.sampling, model, shape_of(facts), order=config.order, is_random=config.random_order)
        except ValueError as error:
            raise inputs.refusal(f"cannot sample {generator.name}: {error}") from error
    labels = {"labels": max(config.classes) + 1} if config.classes else {}
    return {**facts, **labels, "images": config.images, "crops": 1, "listed": None}


@dataclass(frozen=True, eq=False)
class SampleSpec:
    """What a worker needs for any shard."""

    generator: NetworkFile
    config: SampleConfig
    layout: TokenLayout
    labels_I: Labels_I


@stage(
    "sample",
    version=4,
    config=SampleConfig,
    reads={
        "generator": read("generator", help="the generator to sample from"),
        LABELS: read("token-set", help="whose class proportions to follow (labels: like)", optional=True),
        TOKENIZER: read("tokenizer", help="its tokenizer, for imported weights that do not name it", optional=True),
    },
    writes="token-set",
    example="smalti sample --generator digits/rar/generator --images 100 --sampling.guidance.scale 0.3",
    proposes={"rows_per_pass": propose_rows},
    foresees=foresee,
    names={"classes": names_of_generator},
)
def draw_samples(config: SampleConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Draw codes for given classes from a generator.

    The result is a token set like any other: labels are the classes that were asked for, keys are sample ids. Every
    shard is a unit of its own, so an interrupted run continues with the next one.
    """
    card = known_card(config, inputs)
    labels_I = choose_labels(config, card.space.classes, next(iter(inputs.all(LABELS)), None))
    layout = plan_codes(config, card, out.request.key)
    spec = SampleSpec(NetworkFile.of(inputs["generator"], run.device), config, layout, labels_I)
    map_shards(out, run, sample_shard, spec, layout.sizes, label="sample")
    write_labels_and_cards(out, layout, labels_I, [f"{number:0{layout.key_bytes}d}" for number in range(config.images)])
    out.facts = {"images": config.images, "crops": 1, **card.space.facts}
    out.figure = f"{counted(config.images, 'sample')} of {counted(len(np.unique(labels_I)), 'class')}"


def known_card(config: SampleConfig, inputs: Inputs) -> GeneratorCard:
    """What the generator says of itself, its tokenizer included if that was given; UsageError if it cannot be sampled as asked."""
    artifact = inputs["generator"]
    card = read_card(artifact)
    try:
        check_sampling(config.sampling, card.model, card.shape, order=config.order, is_random=config.random_order)
    except ValueError as error:
        raise UsageError(f"cannot sample {artifact.name}: {error}") from error
    if TOKENIZER not in inputs:
        return card
    return card.join(TokenizerCard.of(inputs[TOKENIZER]), what=artifact.name, path=artifact.path)


def choose_labels(config: SampleConfig, classes: int, like: Artifact | None) -> Labels_I:
    """The class of every sample (N,) int32."""
    if (config.labels == "like") != (like is not None):
        raise UsageError(
            f"labels: {config.labels} {'needs' if like is None else 'does not use'} the input {LABELS}",
            hint=f"give a token set as --{LABELS} together with labels: like, or neither",
        )
    if like is None:
        asked = config.classes or tuple(range(classes))
        _check_asked(asked, classes)
        return np.resize(np.array(asked, np.int32), config.images)
    if config.classes is not None:
        raise UsageError("classes chooses the labels, and so does labels: like; give one of them")
    counts_C = np.bincount(open_tokens(like.path).labels, minlength=classes)
    _check_asked(range(len(counts_C)), classes)
    return spread(share_out(config.images, counts_C))


def share_out(total: int, weights_C: NDArray[Any]) -> NDArray[np.int64]:
    """`total` divided in the proportions of integer weights, by largest remainder (ties to the lower class)."""
    exact_C = total * weights_C.astype(np.int64)
    counts_C, remainders_C = np.divmod(exact_C, weights_C.sum())
    lacking = total - int(counts_C.sum())
    counts_C[np.argsort(-remainders_C, kind="stable")[:lacking]] += 1
    return counts_C


def spread(counts_C: NDArray[np.int64]) -> Labels_I:
    """Labels with these counts, every class evenly over the whole length."""
    labels_I = np.repeat(np.arange(len(counts_C), dtype=np.int32), counts_C)
    times_I = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts_C])
    return labels_I[np.argsort(times_I, kind="stable")]


def plan_codes(config: SampleConfig, card: GeneratorCard, key: str) -> TokenLayout:
    """How the codes lie in shards; a key is the sample's number."""
    digits = max(KEY_DIGITS, len(str(config.images - 1)))
    return TokenLayout(describe(config, card, key), digits, config.shard_images, config.chunk_images)


def describe(config: SampleConfig, card: GeneratorCard, key: str) -> TokenAttributes:
    """What the token set says about itself."""
    space = card.space
    return TokenAttributes(
        name="samples",
        n_images=config.images,
        n_crops=1,
        grid=space.grid,
        codes=space.codes,
        classes=space.classes,
        factors=space.factors or None,
        tokenizer=space.tokenizer,
        resolution=space.resolution,
        class_names=space.class_names,
        created_by=key,
        extra={"sampled": {**config_value(config), "generator": card.model.kind}},
    )


def sample_shard(spec: SampleSpec, number: int) -> dict[str, bytes]:
    """The file of one shard."""
    with threads(1):
        drawn = list(sampled_passes(spec.generator, spec.config, spec.labels_I, *spec.layout.shard_range(number)))
    return spec.layout.shard(number, np.concatenate(drawn)[:, None])


def sampled_passes(
    generator: NetworkFile, config: SampleConfig, labels_I: Labels_I, start: int, stop: int
) -> Iterator[NDArray[np.int64]]:
    """Codes (rows, tokens) of samples start to stop (excluded), a pass at a time.

    A pass has exactly `rows_per_pass` rows; the last one is padded with its first row, and given without the padding.
    """
    import torch

    from models.generators.generator import loop_of
    from models.sampling.philox import random_orders

    rows, settings = config.rows_per_pass, load_generator(generator).config
    sample, takes_labels = loop_of(settings), settings.conditions_on == "class"
    decoder = _decoder(generator, rows, config.sampling.guided, config.order, config.precision)
    for first in range(start, stop, rows):
        ids_B = np.arange(first, first + rows)
        ids_B[ids_B >= stop] = first
        if config.random_order:
            decoder.set_orders(random_orders(config.seed, torch.from_numpy(ids_B), decoder.tokens))
        labels_B = torch.from_numpy(labels_I[ids_B].astype(np.int64)) if takes_labels else None
        try:
            with products(config.precision):
                codes_BT = sample(decoder, labels_B, torch.from_numpy(ids_B), config=config.sampling, seed=config.seed)
        except FloatingPointError as error:
            raise NumericError(
                f"samples {first} to {min(first + rows, stop) - 1} cannot be drawn: {error}",
                path=generator.path,
                hint="train the generator again with a lower learning rate",
            ) from error
        yield codes_BT[: stop - first].cpu().numpy()


@cached(2)
def _decoder(file: NetworkFile, rows: int, guided: bool, order: tuple[int, ...] | None, precision: Precision) -> Any:
    """The static cache of this process, made once and used by every pass."""
    import torch

    from models.generators.generator import build_decoder

    orders = None if order is None else torch.tensor(order)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return build_decoder(load_generator(file), rows=rows, guided=guided, orders=orders, dtype=dtype)


def _check_asked(asked: Sequence[int], classes: int) -> None:
    unknown = [label for label in asked if not 0 <= label < classes]
    if unknown:
        raise UsageError(f"class {unknown[0]} was asked for, but the generator knows 0 to {classes - 1}")
