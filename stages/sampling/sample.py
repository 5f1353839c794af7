"""Sampling: codes of a generator for given classes, shard by shard.

A sample's random numbers belong to (seed, stream, sample id, step) alone, and the id is its row in the token set; a pass has
always the same number of rows. So workers, retries and interruptions leave no trace in the codes. Samples whose condition is
codes of another space take another stream than that condition was drawn from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifact import Artifact
from pipeline.compatibility import Facts, Known, KnownInputs
from pipeline.draft import Draft
from pipeline.errors import CorruptError, InputError, NumericError, UsageError
from pipeline.keys import config_value
from pipeline.runtime import Runtime
from pipeline.shards import map_shards
from pipeline.stage import Inputs, read, stage
from pipeline.stage_cache import cached
from smalti.attributes import TokenAttributes
from smalti.counting import counted
from smalti.tokens import TokenSet, check_codes, open_tokens
from stages.codes.classes import check_labels, check_sampling, model_of, names_of_generator, shape_of
from stages.codes.token_files import TokenLayout, write_labels_and_cards
from stages.devices import Precision, products, threads
from stages.sampling.config import SampleConfig
from stages.sampling.pass_rows import propose_rows
from stages.weights.cards import CodeSpace, GeneratorCard, TokenizerCard, read_card
from stages.weights.identity import check_same_tokenizer
from stages.weights.networks import NetworkFile, load_generator

CONDITION = "condition"
LABELS = "labels"
TOKENIZER = "tokenizer"
KEY_DIGITS = 6

Labels_I = NDArray[np.int32]


def foresee(config: SampleConfig, inputs: KnownInputs) -> Facts:
    """Codes of the generator's tokenizer, for labels among its classes."""
    generator, tokenizers, like = inputs["generator"], inputs.all(TOKENIZER), inputs.all(LABELS)
    if any(one.kind == "codebook" for one in tokenizers):
        raise inputs.refusal(f"decodes with {tokenizers[0].name}, which makes a K-Means codebook and has no decoder")
    facts = generator.only("codes", "grid", "classes", "class_names", "factors", "pixels", "tokenizer", "condition")
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
            check_sampling(
                config.sampling,
                model,
                shape_of(facts),
                order=config.order,
                is_random=config.random_order,
                has_condition=CONDITION in inputs,
            )
        except ValueError as error:
            raise inputs.refusal(f"cannot sample {generator.name}: {error}") from error
    labels = {"labels": max(config.classes) + 1} if config.classes else {}
    given: Facts = {"listed": None}
    for condition in inputs.all(CONDITION):
        given |= foresee_condition(config, condition, facts.get("condition") or {}, inputs)
    facts.pop("condition", None)
    return {**facts, **labels, "images": config.images, "crops": 1, **given}


def foresee_condition(config: SampleConfig, condition: Known, learnt: Facts, inputs: KnownInputs) -> Facts:
    """Labels and keys of the samples are those of the condition, which is of the codes that the generator has learnt from."""
    problem = problem_of_asking(config, condition.get("images"), condition.get("crops", 1), has_labels=LABELS in inputs)
    if problem:
        raise inputs.refusal(problem.format(condition.name))
    space = Known(f"the condition that {inputs['generator'].name} learnt from", "token-set", learnt)
    inputs.agree([space, condition], "tokenizer", "codes", "grid")
    return condition.only("classes", "class_names", "labels", "listed")


def problem_of_asking(config: SampleConfig, images: int | None, crops: int, *, has_labels: bool) -> str | None:
    """Why such samples cannot be drawn for a condition ({}) of so many images and crops."""
    if has_labels or config.labels == "like" or config.classes is not None:
        return "takes the labels of its condition {}: leave labels and classes out"
    if crops != 1:
        return f"needs one view of each image as its condition, but {{}} has {crops}"
    if images is not None and images < config.images:
        return (
            f"draws {counted(config.images, 'sample')} (images), each for an image of its condition {{}}, which has only "
            f"{images}: lower images"
        )
    return None


@dataclass(frozen=True, eq=False)
class Asked:
    """What samples are asked for: a class for each, and the token set that is their condition, if there is one.

    keys: of the condition; empty without one.  classes, class_names: that the labels are among.  stream: of random numbers.
    """

    labels_I: Labels_I
    classes: int
    class_names: tuple[str, ...]
    keys: tuple[str, ...] = ()
    condition: Path | None = None
    stream: int = 0


@dataclass(frozen=True, eq=False)
class SampleSpec:
    """The arguments of a shard."""

    generator: NetworkFile
    config: SampleConfig
    layout: TokenLayout
    asked: Asked


@stage(
    "sample",
    version=4,
    config=SampleConfig,
    reads={
        "generator": read("generator", help="the generator to sample from"),
        LABELS: read("token-set", help="whose class proportions to follow (labels: like)", optional=True),
        CONDITION: read(
            "token-set",
            help="codes of another space: sample i is drawn for image i, and has its key and label",
            optional=True,
        ),
        TOKENIZER: read("tokenizer", help="its tokenizer, for imported weights that do not name it", optional=True),
    },
    writes="token-set",
    example="smalti sample --generator digits/rar/generator --images 100 --sampling.guidance.scale 0.3",
    proposes={"rows_per_pass": propose_rows},
    foresees=foresee,
    names={"classes": names_of_generator},
)
def draw_samples(config: SampleConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Draw codes for given classes, or for codes of another space, from a generator.

    The result is a token set like any other: labels are the classes that were asked for and keys are sample ids, or both
    are those of the condition. Every shard is a unit of its own, so an interrupted run continues with the next one.
    """
    card = known_card(config, inputs)
    asked = choose(config, card, inputs)
    layout = plan_codes(config, card, asked, out.request.key)
    spec = SampleSpec(NetworkFile.of(inputs["generator"], run.device), config, layout, asked)
    map_shards(out, run, sample_shard, spec, layout.sizes, label="sample")
    numbers = [f"{number:0{layout.key_bytes}d}" for number in range(config.images)]
    write_labels_and_cards(out, layout, asked.labels_I, list(asked.keys) or numbers)
    out.facts = {"images": config.images, "crops": 1, **card.space.facts, "classes": asked.classes}
    out.figure = f"{counted(config.images, 'sample')} of {counted(len(np.unique(asked.labels_I)), 'class')}"


def known_card(config: SampleConfig, inputs: Inputs) -> GeneratorCard:
    """The generator's card, with its tokenizer if that was given; UsageError if it cannot be sampled with these settings."""
    artifact = inputs["generator"]
    card = read_card(artifact)
    try:
        check_sampling(
            config.sampling,
            card.model,
            card.shape,
            order=config.order,
            is_random=config.random_order,
            has_condition=CONDITION in inputs,
        )
    except ValueError as error:
        raise UsageError(f"cannot sample {artifact.name}: {error}") from error
    if TOKENIZER not in inputs:
        return card
    return card.join(TokenizerCard.of(inputs[TOKENIZER]), what=artifact.name, path=artifact.path)


def choose(config: SampleConfig, card: GeneratorCard, inputs: Inputs) -> Asked:
    """What the samples are drawn for; UsageError or CorruptError where that does not fit to the generator."""
    space, like = card.space, next(iter(inputs.all(LABELS)), None)
    if CONDITION not in inputs:
        return Asked(choose_labels(config, space.classes, like), space.classes, space.class_names)
    artifact: Artifact = inputs[CONDITION]
    tokens = open_tokens(artifact.path)
    problem = problem_of_asking(config, tokens.n_images, tokens.n_crops, has_labels=like is not None)
    if problem:
        raise UsageError(f"the sampling {problem.format(artifact.name)}")
    assert card.condition is not None
    check_condition(tokens, artifact, card.condition, inputs["generator"])
    return Asked(
        tokens.labels[: config.images],
        tokens.attributes.classes,
        tokens.attributes.class_names,
        tuple(tokens.keys[: config.images]),
        artifact.path.absolute(),
        stream_after(tokens),
    )


def check_condition(tokens: TokenSet, artifact: Artifact, space: CodeSpace, generator: Artifact) -> None:
    """CorruptError (exit code 4) unless these are the codes that the generator has learnt from, as far as it names them."""
    for name in ("codes", "grid"):
        found, wanted = getattr(tokens.attributes, name), getattr(space, name)
        if found != wanted:
            raise CorruptError(
                f"{artifact.name} has {name} {found}, but the condition of {generator.name} has {wanted}",
                path=artifact.path,
                hint="give codes of the tokenizer or codebook that it was trained with",
            )
    if space.tokenizer:
        check_same_tokenizer(
            tokens.attributes.tokenizer, space.tokenizer, what=artifact.name, by=generator.name, path=artifact.path
        )


def stream_after(condition: TokenSet) -> int:
    """Of random numbers: another one than the condition was drawn from; 1 where it was not drawn from a generator's first."""
    sampled = condition.attributes.extra.get("sampled")
    before = sampled.get("stream", 0) if isinstance(sampled, dict) else 0
    if type(before) is not int or not 0 <= before < 2**16:
        raise InputError(f"{condition.path} names the stream {before!r}, expected a whole number", path=condition.path)
    return before + 1


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


def plan_codes(config: SampleConfig, card: GeneratorCard, asked: Asked, key: str) -> TokenLayout:
    """How the codes lie in shards; without a condition a key is the sample's number."""
    digits = max(KEY_DIGITS, len(str(config.images - 1)))
    longest = max((len(name.encode()) for name in asked.keys), default=digits)
    return TokenLayout(describe(config, card, asked, key), longest, config.shard_images, config.chunk_images)


def describe(config: SampleConfig, card: GeneratorCard, asked: Asked, key: str) -> TokenAttributes:
    """The attributes of the token set."""
    space = card.space
    return TokenAttributes(
        name="samples",
        n_images=config.images,
        n_crops=1,
        grid=space.grid,
        codes=space.codes,
        classes=asked.classes,
        factors=space.factors or None,
        tokenizer=space.tokenizer,
        resolution=space.resolution,
        class_names=asked.class_names,
        created_by=key,
        extra={
            "sampled": {
                **config_value(config),
                "generator": card.model.kind,
                **({"stream": asked.stream} if asked.stream else {}),
            }
        },
    )


def sample_shard(spec: SampleSpec, number: int) -> dict[str, bytes]:
    """The file of one shard."""
    with threads(1):
        drawn = list(sampled_passes(spec.generator, spec.config, spec.asked, *spec.layout.shard_range(number)))
    return spec.layout.shard(number, np.concatenate(drawn)[:, None])


def sampled_passes(
    generator: NetworkFile, config: SampleConfig, asked: Asked, start: int, stop: int
) -> Iterator[NDArray[np.int64]]:
    """Codes (rows, tokens) of samples start to stop (excluded), a pass at a time.

    A pass has exactly `rows_per_pass` rows; the last one is padded with its first row, and yielded without the padding.
    """
    import torch

    from models.generators.generator import loop_of
    from models.sampling.philox import random_orders

    rows, settings = config.rows_per_pass, load_generator(generator).config
    sample, given = loop_of(settings), _given(asked, settings.conditions_on, start, stop)
    decoder = _decoder(generator, rows, config.sampling.guided, config.order, config.precision)
    for first in range(start, stop, rows):
        ids_B = np.arange(first, first + rows)
        ids_B[ids_B >= stop] = first
        if config.random_order:
            decoder.set_orders(random_orders(config.seed, torch.from_numpy(ids_B), decoder.tokens))
        condition = None if given is None else torch.from_numpy(given[ids_B - start])
        try:
            with products(config.precision):
                codes_BT = sample(
                    decoder,
                    condition,
                    torch.from_numpy(ids_B),
                    config=config.sampling,
                    seed=config.seed,
                    stream=asked.stream,
                )
        except FloatingPointError as error:
            raise NumericError(
                f"samples {first} to {min(first + rows, stop) - 1} cannot be drawn: {error}",
                path=generator.path,
                hint="train the generator again with a lower learning rate",
            ) from error
        yield codes_BT[: stop - first].cpu().numpy()


def _given(asked: Asked, conditions_on: str, start: int, stop: int) -> NDArray[np.int64] | None:
    """The condition of samples start to stop (excluded): labels (I,), codes (I, S), or None."""
    if conditions_on == "none":
        return None
    if asked.condition is None:
        return asked.labels_I[start:stop].astype(np.int64)
    tokens = open_tokens(asked.condition)
    codes_ICS = tokens.tokens.read_rows(start, stop)
    check_codes(codes_ICS, tokens.codes, start, CorruptError, str(asked.condition / "tokens"))
    return codes_ICS[:, 0].astype(np.int64)


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
        raise UsageError(f"class {unknown[0]} was asked for, but the generator has classes 0 to {classes - 1}")
