"""Configs of the quantizers, and the table of their builders (no torch here).

The width of a code is not repeated here: a quantizer is built with `dim`, the latent channels of its autoencoder.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.config import Config


class VectorConfig(Config):
    """Nearest codebook row by Euclidean distance, codebook trained by gradient (VQ-VAE, arXiv 1711.00937)."""

    kind: Literal["vector"] = "vector"
    codes: int = Field(ge=1, description="Size of the codebook.")
    beta: float = Field(default=0.25, ge=0, description="Weight of the loss term named by `beta_on`; the other has 1.")
    beta_on: Literal["commitment", "codebook"] = Field(
        default="commitment", description="The paper weighs the commitment; taming's legacy form weighs the codebook."
    )
    weight: float = Field(default=1.0, ge=0, description="Weight of both terms in the training loss.")
    init: Literal["latents", "uniform"] = Field(
        default="latents", description="First codebook: latents of the first training step, or uniform in +-1/codes."
    )
    revive_every: int = Field(default=0, ge=0, description="Steps between revivals of little-used codes; 0: never.")
    revive_until: int = Field(default=0, ge=0, description="No revival after this training step.")
    revive_below: float = Field(
        default=0.1, ge=0, lt=1, description="A code is revived if used less than this share of an even use."
    )
    usage_decay: float = Field(default=0.95, ge=0, lt=1, description="Decay per step of the running use of each code.")

    def codebook_size(self, dim: int) -> int:
        """Number of codes, given the latent channels of the autoencoder."""
        return self.codes


QuantizerConfig = VectorConfig  # a union tagged by `kind` as soon as there is a second one

BUILDERS: dict[str, str] = {"vector": "models.quantizers.vector:VectorQuantizer"}
