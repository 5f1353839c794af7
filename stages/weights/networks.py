"""Networks of artifacts: built from their config, weights loaded strictly, in evaluation mode; once per process.

A shard function gets its network by a picklable `NetworkFile`; the first shard of a process loads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from models.classifiers.config import BUILDERS as CLASSIFIERS
from models.classifiers.config import ClassifierConfig
from models.config import Config
from models.losses.config import AdversarialConfig, DiscriminatorConfig
from models.registry import build
from models.tokenizer_config import TokenizerConfig
from pipeline.artifact import Artifact, read_manifest
from pipeline.draft import Draft
from pipeline.errors import CorruptError
from pipeline.keys import config_value
from pipeline.stage_cache import cached
from stages.devices import pick_device
from stages.weights.cards import read_card, read_config
from stages.weights.files import fill, load_weights, save_weights

if TYPE_CHECKING:
    from models.losses.adversarial import Adversary

MOST = 8  # networks in memory per process: a sweep over many does not keep them all


@dataclass(frozen=True)
class NetworkFile:
    """Path and device of a network; the digest detects one that was made again."""

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


@cached(MOST)
def load_generator(file: NetworkFile) -> Any:
    """The generator (models.generators.generator.Generator), in evaluation mode, on its device."""
    from models.generators.generator import build_generator

    artifact = file.open()
    card = read_card(artifact)
    return _ready(build_generator(card.model, card.shape), artifact, file.device)


@cached(MOST)
def load_tokenizer(file: NetworkFile) -> Any:
    """The tokenizer (models.tokenizer.Tokenizer), in evaluation mode, on its device."""
    from models.tokenizer import Tokenizer

    artifact = file.open()
    return _ready(Tokenizer(read_config(artifact, TokenizerConfig)), artifact, file.device)


@cached(MOST)
def load_classifier(file: NetworkFile) -> Any:
    """The classifier, in evaluation mode, on its device."""
    artifact = file.open()
    return _ready(build(read_config(artifact, ClassifierConfig), CLASSIFIERS), artifact, file.device)


def _ready(network: Any, artifact: Artifact, device: str) -> Any:
    fill(network, load_weights(artifact), artifact)
    return network.to(pick_device(device)).eval().requires_grad_(False)


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
    found = read_config(start, DiscriminatorCard)
    if found != wanted:
        raise CorruptError(
            f"adversarial.discriminator is {_said(wanted)}, but {start.name} is {_said(found)}",
            path=start.path,
            hint=f"set adversarial.discriminator to {found.discriminator.model_dump_json()}",
        )


def _said(card: DiscriminatorCard) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in config_value(card.discriminator).items())
    return f"of {settings} for {card.channels} channels"
