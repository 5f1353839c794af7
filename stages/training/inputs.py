"""Inputs that several trainings share, and their checks before any image is read (no torch here)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.artifact import Artifact
from pipeline.compatibility import Known, KnownInputs
from pipeline.errors import UsageError
from pipeline.keys import config_value
from pipeline.stage import External, Inputs, Read, read
from smalti.counting import counted
from stages.images.checks import check_seen
from stages.training.config import ReconstructionTraining, TokenizerLearning, TrainingConfig
from stages.weights.checkpoint_reader import identify_file
from stages.weights.networks import DISCRIMINATOR
from stages.weights.perceptual import PERCEPTUAL, PERCEPTUAL_EXTERNAL
from stages.weights.places import VGG16

HELD_OUT = "held-out"
IMAGES: dict[str, Read] = {
    "images": read("image-set", help="images to train on"),
    HELD_OUT: read("image-set", help="images to measure reconstructions on", optional=True),
}
START: dict[str, Read] = {
    DISCRIMINATOR: read("discriminator", help="a trained discriminator to start from", optional=True),
}


def identify_weights(config: TokenizerLearning, path: Path) -> str:
    """SHA-256 of the file; UsageError where the loss has no use for it."""
    if not config.loss.perceptual:
        raise UsageError(f"the weights {path} are given, but loss.perceptual is 0", hint="give it a weight")
    return identify_file(path)


WEIGHTS: dict[str, External] = {
    PERCEPTUAL: replace(
        PERCEPTUAL_EXTERNAL,
        identify=identify_weights,
        place=lambda config: VGG16 if config.loss.perceptual else None,
        otherwise="do without LPIPS: set loss.perceptual to 0",
    )
}


def given(inputs: Inputs, name: str) -> Artifact | None:
    """An optional input."""
    return next(iter(inputs.all(name)), None)


def check_images(config: ReconstructionTraining, inputs: KnownInputs) -> None:
    """Raise for views that do not fit the images, and for a batch that is larger than the data."""
    check_seen(config.views, inputs, "images", HELD_OUT)
    check_batch(config.training, inputs, inputs["images"])


def check_batch(training: TrainingConfig, inputs: KnownInputs, *data: Known) -> None:
    """Raise for a batch that is larger than the data, if their number is known."""
    if any(known.get("images") is None for known in data):
        return
    rows = sum(known.get("images") * known.get("crops", 1) * known.get("views", 1) for known in data)
    if training.batch > rows:
        raise inputs.refusal(
            f"has training.batch {training.batch}, but there {'is' if rows == 1 else 'are'} only {counted(rows, 'row')} to "
            f"train on in {', '.join(known.name for known in data)}",
            hint="lower training.batch",
        )


def check_start(config: TokenizerLearning, inputs: KnownInputs) -> None:
    """Raise for a discriminator that the training does not use, or whose config differs from the training's."""
    for start in inputs.all(DISCRIMINATOR):
        if config.adversarial is None:
            raise inputs.refusal(
                f"reads the discriminator of {start.name}, but its adversarial is null: the training would not use it",
                hint="give adversarial its settings, or leave the discriminator out",
            )
        network = start.get("discriminator")
        if network not in (None, config_value(config.adversarial.discriminator)):
            raise inputs.refusal(
                f"has adversarial.discriminator {config_value(config.adversarial.discriminator)}, but {start.name} "
                f"makes {network}"
            )
