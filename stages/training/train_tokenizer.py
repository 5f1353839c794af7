"""Training of a tokenizer: an autoencoder with a quantizer, from images alone, with or without a discriminator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.compatibility import Facts, KnownInputs
from pipeline.draft import Draft
from pipeline.keys import config_value
from pipeline.runtime import Runtime
from pipeline.stage import Inputs, stage
from smalti.counting import counted
from stages.images.checks import check_rgb
from stages.training.config import TrainTokenizerConfig
from stages.training.inputs import HELD_OUT, IMAGES, START, WEIGHTS, check_images, check_start
from stages.weights.cards import digest_of
from stages.weights.files import save_weights

if TYPE_CHECKING:
    from stages.training.engine import Outcome
    from stages.training.tokenizer import TokenizerTask


def foresee(config: TrainTokenizerConfig, inputs: KnownInputs) -> Facts:
    """A tokenizer of its own codes."""
    check_images(config, inputs)
    check_rgb(config.model.autoencoder, "model.autoencoder", inputs)
    check_start(config, inputs)
    size = config.views.size
    return {
        "tokenizer": inputs.own(digest_of(inputs.made)),
        "codes": config.model.codebook_size,
        "downsample": config.model.downsample,
        "grid": config.model.grid(size, size),
        "pixels": size,
    }


@stage(
    "train-tokenizer",
    version=2,
    config=TrainTokenizerConfig,
    reads=IMAGES | START,
    writes="tokenizer",
    trains=True,
    example="smalti train-tokenizer --images digits/rar/train-images --held-out digits/rar/validation-images --training.steps 800",
    externals=WEIGHTS,
    digits_defaults=("views.size",),
    foresees=foresee,
    checks_inputs=True,
)
def train_tokenizer(config: TrainTokenizerConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Train a tokenizer that turns images into codes and back.

    Writes config.json and weights.safetensors. With `adversarial`, a discriminator learns beside it.
    An interrupted training continues from its last checkpoint.
    """
    from models.tokenizer import Tokenizer
    from stages.training.engine import warn
    from stages.training.reconstruction import train_with_loss

    outcome = train_with_loss(
        config,
        inputs,
        out,
        run,
        learns="tokenizer",
        make=lambda: Tokenizer(config.model),
        label="train-tokenizer",
    )
    used = count_used(outcome, out, run)
    if outcome.is_first:
        save_weights(out, outcome.task.tokenizer.state_dict(), config_value(config.model))
        describe(out, outcome.task, outcome.figures["psnr"], used, where=where(inputs))
        warn(run, config.training.steps, outcome.task.final_warning(out.facts["used"]))


def where(inputs: Inputs) -> str:
    """On which images the figures were measured."""
    return HELD_OUT if HELD_OUT in inputs else "training images"


def count_used(outcome: Outcome[TokenizerTask], out: Draft, run: Runtime) -> int:
    """Codes that the training images use; the processes of a training count together."""
    if outcome.is_first:
        run.progress.say(f"  counting the codes in use in {counted(len(outcome.task.images), 'image')}")
    return outcome.task.used_codes(out)


def describe(out: Draft, task: TokenizerTask, psnr: float, used: int, *, where: str) -> None:
    """Facts and figure of a trained tokenizer."""
    model, size = task.tokenizer.config, task.config.views.size
    out.facts = {
        "codebook_size": model.codebook_size,
        "grid": list(model.grid(size, size)),
        "downsample": model.downsample,
        "image_size": size,
        "psnr": round(psnr, 4),
        "psnr_on": where,
        "used": used,
    }
    out.figure = f"PSNR {psnr:.1f} dB on {where}, {used}/{model.codebook_size} codes used"
