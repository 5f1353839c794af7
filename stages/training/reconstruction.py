"""Shared by the stages that train on reconstructions: images, networks from configs and artifacts, and the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from models.autoencoders.config import PixelRange
from models.losses.config import BUILDERS, LossConfig
from models.registry import build
from models.tokenizer import Tokenizer
from pipeline.artifact import Artifact
from pipeline.draft import Draft
from pipeline.runtime import Runtime
from pipeline.stage import Inputs
from stages.training.config import AdversaryConfig, ReconstructionTraining, TokenizerLearning
from stages.training.engine import Outcome, train
from stages.training.images import open_images
from stages.training.inputs import given
from stages.training.tokenizer import Learns, TokenizerTask, TrainedNetworks
from stages.weights.cards import TokenizerCard
from stages.weights.files import fill, load_weights
from stages.weights.networks import DISCRIMINATOR, build_adversary
from stages.weights.perceptual import PERCEPTUAL, load_lpips


def train_with_loss(
    config: TokenizerLearning,
    inputs: Inputs,
    out: Draft,
    run: Runtime,
    *,
    learns: Learns,
    make: Callable[[], Tokenizer],
    label: str,
) -> Outcome[TokenizerTask]:
    """Train the tokenizer that `make` gives, or its decoder, by the config's loss and beside its discriminator, if any."""

    def networks() -> TrainedNetworks:
        tokenizer, game = make(), config.adversarial
        network = tokenizer.config.autoencoder
        start = given(inputs, DISCRIMINATOR)
        return TrainedNetworks(
            tokenizer,
            build_loss(config.loss, network.pixel_range, run),
            build_adversary(game, channels=network.channels, start=start) if game else None,
        )

    return train_networks(
        config, inputs, out, run, learns=learns, make=networks, adversarial=config.adversarial, label=label
    )


def train_networks(
    config: ReconstructionTraining,
    inputs: Inputs,
    out: Draft,
    run: Runtime,
    *,
    learns: Learns,
    make: Callable[[], TrainedNetworks],
    adversarial: AdversaryConfig | None,
    label: str,
) -> Outcome[TokenizerTask]:
    """Train what `make` builds on the images of the inputs, judged on the held-out ones, if they are given."""
    images, judged = open_images(inputs, run, views=config.views, seed=config.training.seed)
    return train(
        lambda device: TokenizerTask(config, make(), images, judged, device, learns=learns, adversarial=adversarial),
        config.training,
        out,
        run,
        label=label,
    )


def build_loss(config: LossConfig, pixel_range: PixelRange, run: Runtime) -> nn.Module:
    """The loss of a reconstruction, with the weights of LPIPS if it has that part."""
    parts: dict[str, Any] = {}
    if config.perceptual:
        parts["perceptual"] = load_lpips(run.paths[PERCEPTUAL], "cpu", pixel_range)
    loss: nn.Module = build(config, BUILDERS, **parts)
    return loss


def open_tokenizer(artifact: Artifact) -> Tokenizer:
    """A tokenizer with its weights, ready to be trained further."""
    tokenizer = Tokenizer(TokenizerCard.of(artifact).decoder)
    fill(tokenizer, load_weights(artifact), artifact)
    return tokenizer
