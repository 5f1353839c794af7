"""Training of a generator: it learns which codes follow which, from token sets alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from models.generators.config import BUILDERS, GeneratorConfig, RarConfig, RarInit
from models.registry import build, load_class
from pipeline.config import Config
from pipeline.draft import Draft
from pipeline.errors import InputError
from pipeline.keys import config_value
from pipeline.runtime import Runtime
from pipeline.stage import Inputs, read, stage
from smalti.attributes import TokenAttributes
from stages.networks import GeneratorCard
from stages.training.config import AdamW, TrainingConfig, WarmupCosine
from stages.weights import save_weights

if TYPE_CHECKING:
    from torch import nn

    from stages.training.tokens import TrainingTokens

HELD_OUT = "held-out"
SMALL_RAR = RarConfig(
    width=128,
    layers=4,
    heads=4,
    mlp_width=512,
    dropout=0.0,
    attention_dropout=0.0,
    init=RarInit(codes=0.3, classes=1.0, positions=0.3, steps=0.02, adaln=0.02),
)


class OrdersConfig(Config):
    """When the order of the codes is random: always before step `start`, less and less until `end`, then never.

    Networks that know no orders ignore it; start = end = 0 is raster order throughout.
    """

    start: int = Field(default=0, ge=0, description="step at which raster orders begin")
    end: int = Field(default=320, ge=0, description="step from which on all orders are raster")

    @model_validator(mode="after")
    def _ends_after_its_start(self) -> OrdersConfig:
        if self.end < self.start:
            raise ValueError(f"end {self.end} must not come before start {self.start}")
        return self


class TrainGeneratorConfig(Config):
    """A network, the annealing of its orders, and a budget. The defaults suit 16 codes of a small codebook."""

    model: GeneratorConfig = Field(
        default=SMALL_RAR, description="the network; counts of codes and classes are the data's"
    )
    orders: OrdersConfig = Field(default=OrdersConfig(), description="share of random orders over the steps")
    rows_per_pass: int = Field(default=64, ge=1, description="rows that go through the network together in evaluations")
    training: TrainingConfig = Field(
        default=TrainingConfig(
            steps=800,
            optimizer=AdamW(learning_rate=4e-3, betas=(0.9, 0.96), weight_decay=0.03),
            schedule=WarmupCosine(warmup=40),
        ),
        description="budget and optimizer; generators that only count ignore it",
    )


@stage(
    "train-generator",
    version=1,
    config=TrainGeneratorConfig,
    reads={
        "tokens": read("token-set", help="codes to learn, of one or several token sets", many=True),
        HELD_OUT: read("token-set", help="codes to measure the loss on", optional=True),
    },
    writes="generator",
    trains=True,
    example="smalti train-generator --tokens digits/rar/tokens --training.steps 800",
)
def train_generator(config: TrainGeneratorConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Train a generator on token sets; codebook, length and classes are those of the data.

    Writes config.json and weights.safetensors. An interrupted training continues from its last checkpoint.
    """
    from stages.training.tokens import TrainingTokens

    if not inputs.all("tokens"):
        raise InputError("train-generator needs at least one token set", hint="give --tokens")
    first = inputs.all("tokens")[0]
    tokens = TrainingTokens(inputs.all("tokens"), like=first)
    card = make_card(config, tokens.attributes)
    # Those with a `fit` instead of a loss say so.
    if getattr(load_class(config.model, BUILDERS), "trained_by", "gradient") == "counting":
        count(config, card, tokens, out)
        return
    held_out = TrainingTokens([inputs[HELD_OUT]], like=first) if HELD_OUT in inputs else None
    learn(config, card, tokens, held_out, out, run)


def make_card(config: TrainGeneratorConfig, attributes: TokenAttributes) -> GeneratorCard:
    """What the artifact says of itself: the network, and the data that it was made for."""
    return GeneratorCard(
        model=config.model,
        codes=attributes.codes,
        classes=attributes.classes,
        grid=attributes.grid,
        class_names=attributes.class_names,
        tokenizer={name: str(value) for name, value in attributes.tokenizer.items()},
        resolution=attributes.resolution,
    )


def count(config: TrainGeneratorConfig, card: GeneratorCard, tokens: TrainingTokens, out: Draft) -> None:
    """Fit a generator that needs one look at the data and no gradient."""
    import torch

    network = build(card.model, BUILDERS, codes=card.codes, tokens=card.tokens, classes=card.classes)
    codes_NT, labels_N = tokens.read(np.arange(len(tokens)))
    try:
        network.fit(torch.from_numpy(codes_NT), torch.from_numpy(labels_N))
    except ValueError as error:
        raise InputError(str(error)) from error
    save(out, network, card, {"figure": f"counted {len(tokens)} code sequences"})


def learn(
    config: TrainGeneratorConfig,
    card: GeneratorCard,
    tokens: TrainingTokens,
    held_out: TrainingTokens | None,
    out: Draft,
    run: Runtime,
) -> None:
    """Train a generator by gradient."""
    from stages.training.engine import train
    from stages.training.generator import GeneratorTask

    outcome = train(
        lambda device: GeneratorTask(config, card, tokens, held_out, device),
        config.training,
        out,
        run,
        label="train-generator",
    )
    if not outcome.is_first:
        return
    measured = {name: round(value, 6) for name, value in outcome.figures.items()}
    on_held_out = f" (held-out {outcome.figures['loss']:.2f})" if held_out else ""
    said = {
        "figure": f"loss {outcome.loss:.2f}{on_held_out} after {config.training.steps} steps",
        "loss": round(outcome.loss, 6),
        **({"held_out": measured} if measured else {}),
    }
    save(out, outcome.task.network, card, said)


def save(out: Draft, network: nn.Module, card: GeneratorCard, said: dict[str, Any]) -> None:
    """Write the network, and into the manifest what later steps compare."""
    save_weights(out, network.state_dict(), config_value(card))
    out.facts = {
        **said,
        "codes": card.codes,
        "tokens": card.tokens,
        "grid": list(card.grid),
        "classes": card.classes,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "tokenizer": card.tokenizer,
    }
