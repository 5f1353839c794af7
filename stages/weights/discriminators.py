"""Discriminators in artifacts: what tells a tokenizer's reconstructions from images, and LeCAM's running means of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pydantic import Field, TypeAdapter, ValidationError

from models.config import Config
from models.losses.config import AdversarialConfig, DiscriminatorConfig
from pipeline.artifact import Artifact
from pipeline.draft import Draft
from pipeline.errors import CorruptError
from pipeline.keys import config_value
from stages.weights.files import fill, load_config, load_weights, save_weights

if TYPE_CHECKING:
    from models.losses.adversarial import Adversary

DISCRIMINATOR = "discriminator"


class DiscriminatorCard(Config):
    """config.json of a discriminator artifact."""

    discriminator: DiscriminatorConfig
    channels: int = Field(ge=1)


def save_discriminator(out: Draft, adversary: Adversary, *, channels: int) -> None:
    card = DiscriminatorCard(discriminator=adversary.config.discriminator, channels=channels)
    save_weights(out, adversary.state_dict(), config_value(card))


def build_adversary(config: AdversarialConfig, *, channels: int, start: Artifact | None) -> Adversary:
    """A discriminator with new weights, or with those that another training left in `start`.

    CorruptError (exit code 4) where that is another network than the config's.
    """
    from models.losses.adversarial import Adversary

    adversary = Adversary(config, channels=channels)
    if start is not None:
        check_same_network(DiscriminatorCard(discriminator=config.discriminator, channels=channels), start)
        fill(adversary, load_weights(start), start)
    return adversary


def check_same_network(wanted: DiscriminatorCard, start: Artifact) -> None:
    try:
        found = TypeAdapter(DiscriminatorCard).validate_json(json.dumps(load_config(start)))
    except ValidationError as error:
        raise CorruptError(f"config.json of {start.name} does not fit this version", path=start.path) from error
    if found != wanted:
        raise CorruptError(
            f"adversarial.discriminator is {_said(wanted)}, but {start.name} is {_said(found)}",
            path=start.path,
            hint=f"set adversarial.discriminator to {found.discriminator.model_dump_json()}",
        )


def _said(card: DiscriminatorCard) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in config_value(card.discriminator).items())
    return f"of {settings} for {card.channels} channels"
