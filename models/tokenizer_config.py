"""Config of a tokenizer: an autoencoder, a quantizer, and how pixels become bytes (no torch here)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.autoencoders.config import AutoencoderConfig
from models.config import Config
from models.quantizers.config import QuantizerConfig

Rounding = Literal["round", "truncate"]


class TokenizerConfig(Config):
    """Any autoencoder with any quantizer."""

    autoencoder: AutoencoderConfig = Field(description="Pixels to latents and back.")
    quantizer: QuantizerConfig = Field(description="Latents to codes and back.")
    rounding: Rounding = Field(default="round", description="How decoded pixels become bytes.")

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size(self.autoencoder.latent)

    @property
    def downsample(self) -> int:
        """Pixels per code and side."""
        return self.autoencoder.downsample

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of codes of an image of this size."""
        if height % self.downsample or width % self.downsample:
            raise ValueError(
                f"an image of {height}x{width} pixels does not divide into codes of {self.downsample} pixels"
            )
        return height // self.downsample, width // self.downsample
