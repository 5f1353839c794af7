"""Training of a tokenizer's decoder: codes do not change, so token sets and generators remain valid."""

from __future__ import annotations

from pipeline.compatibility import Facts, KnownInputs
from pipeline.draft import Draft
from pipeline.keys import config_value
from pipeline.runtime import Runtime
from pipeline.stage import Inputs, read, stage
from stages.codes.tokenizing import check_codes_fit
from stages.training.config import (
    FinetuneDecoderConfig,
)
from stages.training.inputs import IMAGES, START, WEIGHTS, check_images, check_start
from stages.training.train_tokenizer import count_used, describe, where
from stages.weights.cards import TokenizerCard
from stages.weights.files import save_weights
from stages.weights.identity import CODES_OF


def foresee(config: FinetuneDecoderConfig, inputs: KnownInputs) -> Facts:
    """The same codes as before."""
    check_images(config, inputs)
    check_start(config, inputs)
    grid = check_codes_fit(config.views, inputs["tokenizer"], inputs)
    return {**inputs["tokenizer"].only("tokenizer", "codes", "downsample"), "grid": grid, "pixels": config.views.size}


@stage(
    "finetune-decoder",
    version=2,
    config=FinetuneDecoderConfig,
    reads=IMAGES | {"tokenizer": read("tokenizer", help="the tokenizer whose decoder is trained further")} | START,
    writes="tokenizer",
    trains=True,
    example="smalti finetune-decoder --images digits/rar/train-images --tokenizer digits/rar/tokenizer --training.steps 200",
    externals=WEIGHTS,
    digits_defaults=("views.size",),
    foresees=foresee,
    checks_inputs=True,
)
def finetune_decoder(config: FinetuneDecoderConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Train the decoder of a tokenizer further, with its encoder and its codebook frozen.

    Writes a tokenizer with the codes of the given one: token sets of either may be decoded by both.
    An interrupted training continues from its last checkpoint.
    """
    from stages.training.reconstruction import open_tokenizer, train_with_loss

    parent = inputs["tokenizer"]
    card = TokenizerCard.of(parent)
    outcome = train_with_loss(
        config,
        inputs,
        out,
        run,
        learns="decoder",
        make=lambda: open_tokenizer(parent),
        label="finetune-decoder",
    )
    used = count_used(outcome, out, run)
    if outcome.is_first:
        save_weights(out, outcome.task.tokenizer.state_dict(), config_value(card.decoder))
        describe(out, outcome.task, outcome.figures["psnr"], used, where=where(inputs))
        out.facts |= {CODES_OF: card.identity}
