"""Training of a discriminator against a frozen tokenizer, for published weights without one."""

from __future__ import annotations

from models.losses.config import ReconstructionConfig
from pipeline.compatibility import Facts, KnownInputs
from pipeline.draft import Draft
from pipeline.keys import config_value
from pipeline.runtime import Runtime
from pipeline.stage import Inputs, read, stage
from stages.codes.tokenizing import check_codes_fit
from stages.training.config import (
    AdversaryConfig,
    TrainDiscriminatorConfig,
)
from stages.training.inputs import IMAGES, check_images
from stages.training.train_tokenizer import where
from stages.weights.cards import TokenizerCard
from stages.weights.networks import build_adversary, save_discriminator


def foresee(config: TrainDiscriminatorConfig, inputs: KnownInputs) -> Facts:
    """The network, from which a training of a tokenizer may start."""
    check_images(config, inputs)
    check_codes_fit(config.views, inputs["tokenizer"], inputs)
    return {"discriminator": config_value(config.adversarial.discriminator), "pixels": config.views.size}


@stage(
    "train-discriminator",
    version=2,
    config=TrainDiscriminatorConfig,
    reads=IMAGES
    | {"tokenizer": read("tokenizer", help="the tokenizer whose reconstructions are to be told from images")},
    writes="discriminator",
    trains=True,
    foresees=foresee,
    checks_inputs=True,
    example="smalti train-discriminator --images digits/rar/train-images --tokenizer digits/rar/tokenizer --training.steps 200",
    digits_defaults=("views.size",),
)
def train_discriminator(config: TrainDiscriminatorConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Train a discriminator that tells the reconstructions of a frozen tokenizer from images.

    Writes config.json and weights.safetensors, from which train-tokenizer and finetune-decoder may start.
    An interrupted training continues from its last checkpoint.
    """
    from stages.training.reconstruction import build_loss, open_tokenizer, train_networks
    from stages.training.tokenizer import TrainedNetworks

    parent = inputs["tokenizer"]
    network = TokenizerCard.of(parent).decoder.autoencoder
    game = AdversaryConfig(**config.adversarial.model_dump())
    outcome = train_networks(
        config,
        inputs,
        out,
        run,
        learns="discriminator",
        make=lambda: TrainedNetworks(
            open_tokenizer(parent),
            build_loss(ReconstructionConfig(), network.pixel_range, run),  # for the log alone
            build_adversary(game, channels=network.channels, start=None),
        ),
        adversarial=game,
        label="train-discriminator",
    )
    if outcome.is_first:
        assert outcome.task.adversary is not None
        save_discriminator(out, outcome.task.adversary, channels=network.channels)
        told = outcome.figures["told_apart"]
        out.facts = {
            "told_apart": round(told, 6),
            "told_apart_on": where(inputs),
            "image_size": config.views.size,
        }
        out.figure = f"{told:.1%} of the patches told apart on {where(inputs)}"
