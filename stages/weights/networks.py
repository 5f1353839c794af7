"""Networks out of artifacts: built from their config, filled strictly, ready for inference; once per process.

A shard function asks for its network by `NetworkFile`, which travels to workers; the first shard of a process loads it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, TypeAdapter, ValidationError

from models.classifiers.config import BUILDERS as CLASSIFIERS
from models.classifiers.config import ClassifierConfig
from models.config import Config
from models.generators.config import BUILDERS as GENERATORS
from models.generators.config import GeneratorConfig
from models.losses.config import AdversarialConfig, DiscriminatorConfig
from models.registry import build
from models.tokenizer_config import TokenizerConfig
from pipeline.artifact import Artifact, read_manifest
from pipeline.draft import Draft
from pipeline.errors import CorruptError
from pipeline.keys import config_value
from pipeline.stage_cache import cached
from stages.devices import pick_device
from stages.weights.files import fill, load_config, load_weights, save_weights
from stages.weights.identity import check_same_tokenizer, tokenizer_identity

if TYPE_CHECKING:
    from models.losses.adversarial import Adversary

MOST = 8  # networks in memory per process: a sweep over many does not keep them all


@dataclass(frozen=True)
class NetworkFile:
    """Where a network lies and on which device it runs; the digest keeps one that was made again from being mixed up."""

    path: Path
    digest: str
    device: str

    @classmethod
    def of(cls, artifact: Artifact, device: str) -> NetworkFile:
        """device: as the command line says it; "auto" is decided by whoever loads."""
        return cls(artifact.path.absolute(), artifact.digest, device)

    def open(self) -> Artifact:
        artifact = read_manifest(self.path)
        if artifact.digest != self.digest:
            raise CorruptError(f"{self.path} was made again while it was being read", path=self.path)
        return artifact


class GeneratorCard(Config):
    """config.json of a generator artifact: the network, and the token set that it was trained on.

    tokenizer: identity of the tokenizer that made the codes.  resolution: pixels of the images behind them.
    """

    model: GeneratorConfig
    codes: int = Field(ge=1)
    classes: int = Field(ge=1)
    grid: tuple[int, int] = Field(strict=False)
    class_names: tuple[str, ...] = Field((), strict=False)
    tokenizer: dict[str, str]
    resolution: int | None = None

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


def read_card(artifact: Artifact) -> GeneratorCard:
    config: GeneratorCard = _checked(artifact, GeneratorCard)
    return config


def read_tokenizer_config(artifact: Artifact) -> TokenizerConfig:
    config: TokenizerConfig = _checked(artifact, TokenizerConfig)
    return config


def read_classifier_config(artifact: Artifact) -> ClassifierConfig:
    config: ClassifierConfig = _checked(artifact, ClassifierConfig)
    return config


def join_tokenizer(card: GeneratorCard, tokenizer: Artifact, *, what: str, path: Path) -> GeneratorCard:
    """The card with this tokenizer in it: that of a published generator is not in its file, but given beside it.

    CorruptError (exit code 4) where it has other codes than the generator, or is not the tokenizer that the card names.
    """
    identity, config = tokenizer_identity(tokenizer), read_tokenizer_config(tokenizer)
    if config.codebook_size != card.codes:
        raise CorruptError(
            f"{what} is a generator of {card.codes} codes, but {tokenizer.name} has {config.codebook_size}",
            path=path,
            hint="give the tokenizer that it was trained with",
        )
    if card.tokenizer:
        check_same_tokenizer(card.tokenizer, identity, what=what, by=tokenizer.name, path=path)
    return card.model_copy(update={"tokenizer": identity, "resolution": card.grid[0] * config.downsample})


@cached(MOST)
def load_generator(file: NetworkFile) -> Any:
    """The generator, in evaluation mode, on its device."""
    artifact = file.open()
    card = read_card(artifact)
    network = build(card.model, GENERATORS, codes=card.codes, tokens=card.tokens, classes=card.classes)
    return _ready(network, artifact, file.device)


@cached(MOST)
def load_tokenizer(file: NetworkFile) -> Any:
    """The tokenizer (models.tokenizer.Tokenizer), in evaluation mode, on its device."""
    from models.tokenizer import Tokenizer

    artifact = file.open()
    return _ready(Tokenizer(read_tokenizer_config(artifact)), artifact, file.device)


@cached(MOST)
def load_classifier(file: NetworkFile) -> Any:
    """The classifier, in evaluation mode, on its device."""
    artifact = file.open()
    return _ready(build(read_classifier_config(artifact), CLASSIFIERS), artifact, file.device)


def _ready(network: Any, artifact: Artifact, device: str) -> Any:
    fill(network, load_weights(artifact), artifact)
    return network.to(pick_device(device)).eval().requires_grad_(False)


def _checked(artifact: Artifact, model: Any) -> Any:
    """Its config.json as `model`; one that does not validate belongs to another version or was altered: exit code 4."""
    try:
        return TypeAdapter(model).validate_json(json.dumps(load_config(artifact)))
    except ValidationError as error:
        complaint = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in complaint["loc"])
        raise CorruptError(
            f"config.json of {artifact.name} does not fit this version: {place}: {complaint['msg']}", path=artifact.path
        ) from error


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
