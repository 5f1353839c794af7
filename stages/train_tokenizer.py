"""Training of a tokenizer: an autoencoder with a quantizer, from images alone."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from models.autoencoders.config import ConvolutionalConfig
from models.losses.config import LossConfig, ReconstructionConfig
from models.quantizers.config import VectorConfig
from models.tokenizer_config import TokenizerConfig
from pipeline.config import Config
from pipeline.draft import Draft
from pipeline.images import Views
from pipeline.images.views import ShiftViews
from pipeline.runtime import Runtime
from pipeline.stage import Inputs, read, stage
from stages.training.config import AdamW, OneCycle, TrainingConfig
from stages.weights import config_json, save_weights

HELD_OUT = "held-out"
SMALL_TOKENIZER = TokenizerConfig(
    autoencoder=ConvolutionalConfig(widths=(16, 32, 96), pixel_range="0..1"),
    quantizer=VectorConfig(codes=256, weight=0.1, revive_every=20, revive_until=560),
)


class TrainTokenizerConfig(Config):
    """A network, its loss, the views under which it sees the images, and a budget. The defaults suit 32-pixel images."""

    model: TokenizerConfig = Field(default=SMALL_TOKENIZER, description="the tokenizer")
    loss: LossConfig = Field(default=ReconstructionConfig(l2=4.0), description="what a reconstruction is compared by")
    views: Views = Field(
        default=ShiftViews(size=32, pixels=1, fill=0), description="views to train on; the upright one is judged"
    )
    rows_per_pass: int = Field(
        default=64, ge=1, description="images that go through the network together when it is judged"
    )
    training: TrainingConfig = Field(
        default=TrainingConfig(
            steps=800,
            batch=32,
            optimizer=AdamW(learning_rate=5e-3, weight_decay=0.01),
            schedule=OneCycle(rise=0.25, end=1e-3),
        ),
        description="budget and optimizer",
    )

    @model_validator(mode="after")
    def _views_divide_into_codes(self) -> TrainTokenizerConfig:
        self.model.grid(self.views.size, self.views.size)
        return self


@stage(
    "train-tokenizer",
    version=1,
    config=TrainTokenizerConfig,
    reads={
        "images": read("image-set", help="images to train on"),
        HELD_OUT: read("image-set", help="images to measure reconstructions on", optional=True),
    },
    writes="tokenizer",
    trains=True,
    example="smalti train-tokenizer --images digits/rar/train-images --held-out digits/rar/held-out-images --training.steps 800",
)
def train_tokenizer(config: TrainTokenizerConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Train a tokenizer that turns images into codes and back.

    Writes config.json and weights.safetensors. An interrupted training continues from its last checkpoint.
    """
    from stages.training.engine import train
    from stages.training.images import TrainingImages
    from stages.training.tokenizer import TokenizerTask

    images = TrainingImages(inputs["images"], views=config.views, seed=config.training.seed)
    held_out = None
    if HELD_OUT in inputs:
        held_out = TrainingImages(inputs[HELD_OUT], views=config.views, seed=config.training.seed)
    outcome = train(
        lambda device: TokenizerTask(config, images, held_out or images, device),
        config.training,
        out,
        run,
        label="train-tokenizer",
    )
    if outcome.is_first:
        save_weights(out, outcome.task.tokenizer.state_dict(), config_json(config.model))
        where = HELD_OUT if held_out else "training images"
        out.facts = facts(config, outcome.task.used_codes(), outcome.figures["psnr"], where=where)


def facts(config: TrainTokenizerConfig, used: int, psnr: float, *, where: str) -> dict[str, Any]:
    codes, size = config.model.codebook_size, config.views.size
    return {
        "figure": f"PSNR {psnr:.1f} dB on {where}, {used}/{codes} codes used",
        "codebook_size": codes,
        "grid": list(config.model.grid(size, size)),
        "downsample": config.model.downsample,
        "image_size": size,
        "psnr": round(psnr, 4),
        "psnr_on": where,
        "used": used,
    }
