"""Configs of the tokenizer losses, and the table of their builders (no torch here)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from models.config import Config


class ReconstructionConfig(Config):
    """Weighted mean absolute and mean squared error of the pixels, in the network's pixel range, and LPIPS."""

    kind: Literal["reconstruction"] = "reconstruction"
    l1: float = Field(default=0.0, ge=0, description="Weight of the mean absolute error.")
    l2: float = Field(default=1.0, ge=0, description="Weight of the mean squared error.")
    perceptual: float = Field(
        default=0.0, ge=0, description="Weight of LPIPS (VGG16), which needs weights; 0: it is not computed."
    )

    @model_validator(mode="after")
    def _compares_something(self) -> ReconstructionConfig:
        if self.l1 == self.l2 == self.perceptual == 0:
            raise ValueError("l1, l2 and perceptual are all 0: there is no loss to train on; give one of them a weight")
        return self


class PatchConfig(Config):
    """PatchGAN (arXiv 1611.07004): overlapping patches are classified one by one."""

    kind: Literal["patch"] = "patch"
    width: int = Field(default=64, ge=1, description="Channels of the first layer.")
    layers: int = Field(default=3, ge=1, description="Layers that halve the resolution.")

    @property
    def least_pixels(self) -> int:
        """Side of the smallest image that gives a logit: two more layers take a pixel each, and one must be left."""
        return 3 * 2**self.layers


class BlurConfig(Config):
    """Discriminator with blurred downsampling, of Open-MAGVIT2's 16,384-code tokenizer."""

    kind: Literal["blur"] = "blur"
    width: int = Field(default=128, ge=32, multiple_of=32, description="Channels of the first layer.")
    stages: int = Field(default=3, ge=1, description="Stages that halve the resolution.")
    resample: Literal["blur", "average"] = Field(default="blur", description="Fixed blur, or 2x2 averages.")

    @property
    def least_pixels(self) -> int:
        """Side of the smallest image that can be halved `stages` times."""
        return 2**self.stages


DiscriminatorConfig = Annotated[PatchConfig | BlurConfig, Field(discriminator="kind")]


class DiscriminationConfig(Config):
    """A discriminator and its loss; the defaults are IBQ's."""

    discriminator: DiscriminatorConfig = Field(
        default=PatchConfig(), description="The network that separates images from reconstructions."
    )
    loss: Literal["hinge", "vanilla", "non-saturating"] = Field(
        default="hinge", description="The discriminator's loss."
    )
    lecam: float = Field(default=0.05, ge=0, description="Weight of the LeCAM regulariser (arXiv 2104.03310).")
    lecam_decay: float = Field(default=0.999, ge=0, lt=1, description="Decay per step of LeCAM's running means.")


class AdversarialConfig(DiscriminationConfig):
    """A discriminator that is trained with the tokenizer, and the adversarial loss; the defaults are IBQ's."""

    weight: float | None = Field(
        default=0.1, ge=0, description="Weight of the adversarial term; null: from the ratio of gradients."
    )
    adaptive_scale: float = Field(default=0.8, ge=0, description="Factor of that ratio where weight is null.")
    start: int = Field(default=0, ge=0, description="First training step with adversarial losses, of both networks.")
    order: Literal["discriminator-first", "generator-first"] = Field(
        default="discriminator-first", description="Whose step comes first, on the same reconstruction."
    )


LossConfig = ReconstructionConfig  # a union tagged by `kind` as soon as there is a second one

BUILDERS: dict[str, str] = {"reconstruction": "models.losses.reconstruction:ReconstructionLoss"}
DISCRIMINATORS: dict[str, str] = {
    "patch": "models.losses.patch_discriminator:PatchDiscriminator",
    "blur": "models.losses.blur_discriminator:BlurDiscriminator",
}
