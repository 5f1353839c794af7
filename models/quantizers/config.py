"""Configs of the quantizers, and the table of their builders (no torch here).

A quantizer is built with its config and `dim`, the latent channels of its autoencoder.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from models.config import NEUTRAL, Config


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


class LookupFreeConfig(Config):
    """Signs of the latent channels, 2 ** channels codes (MAGVIT-v2, arXiv 2310.05737); defaults are Open-MAGVIT2's."""

    kind: Literal["lookup-free"] = "lookup-free"
    temperature: float = Field(default=0.01, gt=0, description="Divides the logits of the entropy loss.")
    entropy_weight: float = Field(default=0.1, ge=0, description="Weight of the entropy loss.")
    sample_weight: float = Field(default=1.0, ge=0, description="In it: weight of the entropy of single tokens.")
    batch_weight: float = Field(default=1.0, ge=0, description="In it: weight of the (maximised) entropy of codes.")
    entropy_tokens: int = Field(
        default=2048,
        ge=1,
        json_schema_extra=NEUTRAL,
        description="Tokens over which the entropy of codes is taken, as published per device; a smaller batch is one group.",
    )
    commitment_weight: float = Field(default=0.25, ge=0, description="Weight of the distance of latents to signs.")
    enlarge_ratio: float = Field(default=0.0, ge=0, description="More entropy weight at first: (1 + ratio) at step 0.")
    enlarge_steps: int = Field(default=2000, ge=1, description="Steps until that surplus has fallen to nothing.")
    usage_decay: float = Field(default=0.99, ge=0, lt=1, description="Decay per step of the running use of each code.")
    dead_below: float = Field(
        default=0.1, ge=0, lt=1, description="A code is dead if used less than this share of an even use."
    )

    def codebook_size(self, dim: int) -> int:
        """Number of codes, given the latent channels of the autoencoder."""
        return 2**dim

    def enlargement(self, step: int) -> float:
        """Relative increase of the entropy weight at this step."""
        return self.enlarge_ratio * max(0.0, 1 - step / self.enlarge_steps)


class IndexBackpropagationConfig(Config):
    """Largest dot product with a codebook of which every row gets a gradient (IBQ, arXiv 2412.02692)."""

    kind: Literal["index-backpropagation"] = "index-backpropagation"
    codes: int = Field(ge=1, description="Size of the codebook.")
    weight: float = Field(default=1.0, ge=0, description="Weight of the quantization loss.")
    beta: float = Field(default=0.25, ge=0, description="In it: weight of the term that moves codes to latents.")
    temperature: float = Field(default=0.01, gt=0, description="Divides the logits of the entropy loss.")
    entropy_weight: float = Field(default=0.05, ge=0, description="Weight of the entropy loss; 0: none.")
    sample_weight: float = Field(default=1.0, ge=0, description="In it: weight of the entropy of single tokens.")
    batch_weight: float = Field(default=1.0, ge=0, description="In it: weight of the (maximised) entropy of codes.")
    entropy_tokens: int = Field(
        default=1024,
        ge=1,
        json_schema_extra=NEUTRAL,
        description="Tokens over which the entropy of codes is taken, as published per device; a smaller batch is one group.",
    )
    usage_decay: float = Field(default=0.99, ge=0, lt=1, description="Decay per step of the running use of each code.")
    dead_below: float = Field(
        default=0.1, ge=0, lt=1, description="A code is dead if used less than this share of an even use."
    )

    def codebook_size(self, dim: int) -> int:
        """Number of codes, given the latent channels of the autoencoder."""
        return self.codes


QuantizerConfig = Annotated[VectorConfig | LookupFreeConfig | IndexBackpropagationConfig, Field(discriminator="kind")]

BUILDERS: dict[str, str] = {
    "vector": "models.quantizers.vector:VectorQuantizer",
    "lookup-free": "models.quantizers.lookup_free:LookupFreeQuantizer",
    "index-backpropagation": "models.quantizers.index_backpropagation:IndexBackpropagationQuantizer",
}
