"""Configs of the autoencoders, and the table of their builders (no torch here)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from models.config import Config

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


AutoencoderConfig = ConvolutionalConfig  # a union tagged by `kind` as soon as there is a second one

BUILDERS: dict[str, str] = {"convolutional": "models.autoencoders.convolutional:ConvolutionalAutoencoder"}
