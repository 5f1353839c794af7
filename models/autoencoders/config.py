"""Configs of the autoencoders, and the table of their builders (no torch here)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from models.config import NEUTRAL, Config

Count = Annotated[int, Field(ge=1)]
PixelRange = Literal["0..1", "-1..1"]


class ConvolutionalConfig(Config):
    """A small residual autoencoder without attention; 32-pixel images become 4x4 latents with the defaults."""

    kind: Literal["convolutional"] = "convolutional"
    channels: Count = Field(default=3, description="Colour channels of the images.")
    stem: Count = Field(default=2, description="Pixels per side that the stem folds into channels (pixel unshuffle).")
    widths: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)] = Field(
        default=(32, 64, 128), description="Channels of each level; every level after the first halves the grid."
    )
    blocks: Count = Field(default=1, description="Residual blocks per level, in the encoder and in the decoder.")
    groups: Count = Field(default=8, description="Groups of each group normalisation; divides every width.")
    latent: Count = Field(default=16, description="Channels of the latent that is quantized.")
    pixel_range: PixelRange = Field(default="-1..1", description="Pixel range that the network sees.")

    @property
    def downsample(self) -> int:
        """Pixels per latent cell and side."""
        return self.stem * 2 ** (len(self.widths) - 1)

    @model_validator(mode="after")
    def _groups_divide_widths(self) -> ConvolutionalConfig:
        odd = [width for width in self.widths if width % self.groups]
        if odd:
            raise ValueError(f"groups {self.groups} must divide every width, but not {odd[0]}")
        return self


Multipliers = Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]


class LevelledConfig(Config):
    """What the three published VQGAN networks share; every level after the first halves the grid."""

    channels: Count = Field(default=3, description="Colour channels of the images.")
    width: Annotated[int, Field(ge=32, multiple_of=32)] = Field(default=128, description="Channels after the stem.")
    multipliers: Multipliers = Field(default=(1, 1, 2, 2, 4), description="Channels of each level, in units of width.")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def downsample(self) -> int:
        """Pixels per latent cell and side."""
        return 2 ** (len(self.multipliers) - 1)


class TamingConfig(LevelledConfig):
    """VQGAN of taming-transformers (arXiv 2012.09841) with attention; the defaults are IBQ's."""

    kind: Literal["taming"] = "taming"
    blocks: Count = Field(default=4, description="Residual blocks per encoder level; the decoder has one more.")
    attention_levels: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] = Field(
        default=(4,), description="Levels (0 is full resolution) where attention follows every residual block."
    )
    features: Count = Field(default=256, description="Channels between network and 1x1 convolution to the latent.")
    latent: Count = Field(default=256, description="Channels of the latent that is quantized.")
    pixel_range: PixelRange = Field(default="-1..1", description="Pixel range that the network sees.")

    @model_validator(mode="after")
    def _attention_is_at_a_level(self) -> TamingConfig:
        odd = [level for level in self.attention_levels if level >= len(self.multipliers)]
        if odd:
            raise ValueError(
                f"attention_levels names level {odd[0]}, but multipliers has levels 0 to {len(self.multipliers) - 1}"
            )
        return self


class Magvit2Config(LevelledConfig):
    """Open-MAGVIT2 (arXiv 2409.04410): the 256-pixel network by default; multipliers (1, 2, 2, 4) are the 128-pixel one."""

    kind: Literal["magvit2"] = "magvit2"
    blocks: Count = Field(default=4, description="Residual blocks per level, in the encoder and in the decoder.")
    latent: Count = Field(default=18, description="Channels of the latent that is quantized, one bit each.")
    pixel_range: PixelRange = Field(default="-1..1", description="Pixel range that the network sees.")


class MaskgitConfig(LevelledConfig):
    """VQGAN of MaskGIT (arXiv 2202.04200), which RAR and MAGE use: no attention."""

    kind: Literal["maskgit"] = "maskgit"
    blocks: Count = Field(default=2, description="Residual blocks per level, in the encoder and in the decoder.")
    middle_blocks: Count = Field(
        default=2,
        json_schema_extra=NEUTRAL,
        description="Residual blocks at the lowest resolution: RAR's code has as many as per level, MAGE's always two.",
    )
    latent: Count = Field(default=256, description="Channels of the latent that is quantized.")
    pixel_range: PixelRange = Field(default="0..1", description="Pixel range that the network sees.")


AutoencoderConfig = Annotated[
    ConvolutionalConfig | TamingConfig | Magvit2Config | MaskgitConfig, Field(discriminator="kind")
]

BUILDERS: dict[str, str] = {
    "convolutional": "models.autoencoders.convolutional:ConvolutionalAutoencoder",
    "taming": "models.autoencoders.taming:TamingAutoencoder",
    "magvit2": "models.autoencoders.magvit2:Magvit2Autoencoder",
    "maskgit": "models.autoencoders.maskgit:MaskgitAutoencoder",
}
