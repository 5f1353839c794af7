"""Training of a generator on token sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.artifact import Artifact
from pipeline.compatibility import Facts, KnownInputs
from pipeline.draft import Draft
from pipeline.errors import InputError
from pipeline.keys import config_value
from pipeline.runtime import Runtime
from pipeline.stage import Inputs, read, stage
from smalti.counting import counted
from stages.codes.classes import check_labels, check_sampling, names_of_tokens, shape_of
from stages.training.config import TrainGeneratorConfig
from stages.training.inputs import check_batch
from stages.training.rows import refuse_rows, settle_rows
from stages.weights.cards import CodeSpace, GeneratorCard, TokenizerCard
from stages.weights.files import save_weights
from stages.weights.networks import NetworkFile

if TYPE_CHECKING:
    from models.generators.config import CodeShape
    from models.generators.generator import Generator
    from stages.training.tokens import TrainingTokens

HELD_OUT, TOKENIZER = "held-out", "tokenizer"
CONDITION, HELD_OUT_CONDITION = "condition", "held-out-condition"


def check_given(config: TrainGeneratorConfig, inputs: KnownInputs) -> None:
    """A refusal unless codes have conditions exactly where the generator takes some, one set for each set of codes."""
    codes, given, kind = inputs.all("tokens"), inputs.all(CONDITION), f"a generator of kind {config.model.kind}"
    if given and config.model.conditions_on != "codes":
        raise inputs.refusal(
            f"reads {given[0].name} as a condition, but {kind} that conditions on {config.model.conditions_on} has no use "
            "for it: leave it out"
        )
    if config.model.conditions_on == "codes" and not given:
        raise inputs.refusal(
            f"has no input condition, but {kind} that conditions on codes needs the codes of another space: give their "
            "token set, made of the same views"
        )
    if given and len(given) != len(codes):
        raise inputs.refusal(
            f"reads {counted(len(codes), 'token set')} and {len(given)} as their condition: give one for each, in the same "
            "order"
        )
    if (HELD_OUT_CONDITION in inputs) != (bool(given) and HELD_OUT in inputs):
        raise inputs.refusal(
            f"reads {HELD_OUT_CONDITION}, but no held-out codes with a condition: leave it out"
            if HELD_OUT_CONDITION in inputs
            else f"has held-out codes, but not the codes that they are given: give {HELD_OUT_CONDITION} too"
        )
    if given and config.samples:
        raise inputs.refusal(
            "shows samples on the way (samples), but these need codes as a condition: leave samples out"
        )
    held_out = zip(inputs.all(HELD_OUT), inputs.all(HELD_OUT_CONDITION), strict=False)
    for pair in (*zip(codes, given, strict=False), *held_out):
        if not all(
            one.artifact for one in pair
        ):  # of finished ones the first key that differs is named when they are read
            inputs.agree(pair, "listed", "images", "crops")


def settle(config: TrainGeneratorConfig, inputs: KnownInputs) -> TrainGeneratorConfig:
    """A number of rows for `training.rows_per_pass auto`, as soon as the codes are known."""
    tokens, conditions = inputs.all("tokens"), inputs.all(CONDITION)
    given = {"condition": conditions[0].facts} if conditions else {}
    shape = shape_of({**tokens[0].facts, **given}) if tokens else None
    if config.is_settled:
        return config
    if shape is None:
        if any(one.artifact for one in tokens):
            raise inputs.refusal(
                f"has training.rows_per_pass auto, but {tokens[0].name} does not say its codes and grid: give it a number"
            )
        return config
    try:
        return settle_rows(config, shape)
    except ValueError as error:
        raise inputs.refusal(f"has training.rows_per_pass auto, but {error}: give it a number") from error


CODES = ("tokenizer", "codes", "pixels", "grid", "factors", "classes", "class_names")


def foresee(config: TrainGeneratorConfig, inputs: KnownInputs) -> Facts:
    """All token sets are alike, and so is the tokenizer that shows samples, but for the size that it was made for."""
    if not inputs.all("tokens"):
        raise inputs.refusal("has no token set to learn from")
    check_given(config, inputs)
    facts = known_codes(inputs)
    inputs.agree([inputs.all("tokens")[0], *inputs.all(TOKENIZER)], "tokenizer", "codes")
    if (config.samples is None) != (TOKENIZER not in inputs):
        raise inputs.refusal(
            "shows samples on the way (samples), but reads no tokenizer"
            if config.samples
            else f"reads the tokenizer {inputs[TOKENIZER].name}, but shows no samples on the way: set samples.every"
        )
    known = {**facts, "model": config.model}
    if config.model.trained_by == "gradient":
        check_batch(config.training, inputs, *inputs.all("tokens"))
    if config.samples:
        check_labels(config.samples.classes, known.get("classes"), inputs)
    try:
        check_model(config, shape_of(known))
    except ValueError as error:
        raise inputs.refusal(f"cannot train a generator of kind {config.model.kind}: {error}") from error
    return known


def known_codes(inputs: KnownInputs) -> Facts:
    """What is known of the codes that are learnt, and of those that are given for them."""

    def common(*names: str) -> Facts:
        alike = [known for name in names for known in inputs.all(name)]
        return {**alike[0].only("tokenizer"), **inputs.agree(alike, *CODES)}

    given = {"condition": common(CONDITION, HELD_OUT_CONDITION)} if inputs.all(CONDITION) else {}
    return {**common("tokens", HELD_OUT), **given}


def check_model(config: TrainGeneratorConfig, shape: CodeShape | None) -> None:
    """ValueError, with the reason, if the generator cannot learn such codes, as far as they are known, or not be sampled as asked."""
    if shape is not None:
        config.model.check(shape)
    if config.samples:
        check_sampling(config.samples.sampling, config.model, shape)


@stage(
    "train-generator",
    version=4,
    config=TrainGeneratorConfig,
    reads={
        "tokens": read("token-set", help="codes to learn, of one or several token sets", many=True),
        HELD_OUT: read("token-set", help="codes to measure the loss on", optional=True),
        CONDITION: read(
            "token-set",
            help="codes of another space that each of the codes is given, of the same views; one set for each of tokens",
            many=True,
            optional=True,
        ),
        HELD_OUT_CONDITION: read("token-set", help="the same for held-out", optional=True),
        TOKENIZER: read("tokenizer", help="what makes images of samples on the way (samples)", optional=True),
    },
    writes="generator",
    foresees=foresee,
    checks_inputs=True,
    settles=settle,
    trains=True,
    example="smalti train-generator --tokens digits/rar/tokens --training.steps 800",
    names={"samples.classes": names_of_tokens},
)
def train_generator(config: TrainGeneratorConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Train a generator on token sets; codebook, length and classes are those of the data.

    Writes config.json and weights.safetensors. An interrupted training continues from its last checkpoint. With a
    tokenizer and `samples`, grids of samples appear in the artifact's log/ on the way.
    """
    from stages.training.tokens import TrainingTokens

    first = inputs.all("tokens")[0]
    run.progress.say("  reading and checking the codes, building the network")
    condition, judged_condition = (
        TrainingTokens(inputs.all(name), like=inputs.all(CONDITION)[0]) if inputs.all(name) else None
        for name in (CONDITION, HELD_OUT_CONDITION)
    )
    tokens = TrainingTokens(inputs.all("tokens"), like=first, condition=condition)
    card = GeneratorCard(
        model=config.model,
        space=CodeSpace.of(tokens.attributes),
        condition=CodeSpace.of(condition.attributes) if condition else None,
    )
    if config.model.trained_by == "counting":
        count(config, card, tokens, out)
        return
    held_out = (
        TrainingTokens([inputs[HELD_OUT]], like=first, condition=judged_condition) if HELD_OUT in inputs else None
    )
    tokenizer = known_tokenizer(card, first, next(iter(inputs.all(TOKENIZER)), None), run)
    learn(config, card, tokens, held_out, tokenizer, out, run)


def known_tokenizer(
    card: GeneratorCard, first: Artifact, tokenizer: Artifact | None, run: Runtime
) -> NetworkFile | None:
    """Where the tokenizer lies, if there is one; CorruptError if the codes are another's."""
    if tokenizer is None:
        return None
    card.join(TokenizerCard.of(tokenizer), what=first.name, path=first.path)
    return NetworkFile.of(tokenizer, run.device)


def count(config: TrainGeneratorConfig, card: GeneratorCard, tokens: TrainingTokens, out: Draft) -> None:
    """Fit a generator by counting, in one pass over the data."""
    import torch

    from models.generators.generator import build_generator

    network = build_generator(card.model, card.shape)
    try:
        network.fit((torch.from_numpy(codes_NT), torch.from_numpy(labels_N)) for codes_NT, labels_N in tokens.blocks())
    except ValueError as error:
        raise InputError(str(error)) from error
    save(out, network, card, {})
    out.figure = f"counted {counted(len(tokens), 'code sequence')}"


def learn(
    config: TrainGeneratorConfig,
    card: GeneratorCard,
    tokens: TrainingTokens,
    held_out: TrainingTokens | None,
    tokenizer: NetworkFile | None,
    out: Draft,
    run: Runtime,
) -> None:
    """Train a generator by gradient."""
    from stages.training.engine import train
    from stages.training.generator import GeneratorTask

    refuse_rows(config, card.shape, run.device)
    if config.compiles:
        run.progress.say("  the first step compiles the blocks, which takes a minute")
    outcome = train(
        lambda device: GeneratorTask(config, card, tokens, held_out, device, tokenizer=tokenizer),
        config.training,
        out,
        run,
        label="train-generator",
    )
    if not outcome.is_first:
        return
    measured = {name: round(value, 6) for name, value in outcome.figures.items()}
    on_held_out = f" (held-out {outcome.figures['loss']:.2f})" if held_out else ""
    losses = {"loss": round(outcome.loss, 6), **({"held_out": measured} if measured else {})}
    save(out, outcome.task.network, card, losses)
    out.figure = f"loss {outcome.loss:.2f}{on_held_out} after {counted(config.training.steps, 'step')}"


def save(out: Draft, network: Generator, card: GeneratorCard, losses: dict[str, Any]) -> None:
    """Write the network, and facts for later steps."""
    save_weights(out, network.state_dict(), config_value(card))
    out.facts = {
        **losses,
        **card.space.facts,
        **({"condition": card.condition.facts} if card.condition else {}),
        "tokens": card.space.tokens,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
