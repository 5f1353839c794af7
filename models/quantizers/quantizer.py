"""The interface of the quantizers: what every one of them takes and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.batch_part import BatchPart
from models.metrics import perplexity

# Shapes: B images, D latent channels, h w latent grid, N tokens (B*h*w), K codes


class Quantized(NamedTuple):
    """A quantized latent grid.

    z_BDhw: what the decoder gets; gradients reach the encoder through it.
    codes_Bhw: int64 codes.
    losses: named scalars that carry the quantizer's own weights: their sum is its share of the training loss.
    stats: named scalars without gradient, for the log; those of `Quantizer.stats` are among them.
    """

    z_BDhw: Tensor
    codes_Bhw: Tensor
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]


class Quantizer(nn.Module, ABC):
    """Latents to codes and back. Built as `Quantizer(config, dim=D)`; a subclass passes on its number of codes.

    part: what the next forward pass sees. A training that cuts a batch into pieces or shares it sets it before each
    pass. Clocks count steps: what changes once per step does so with the last piece.
    """

    def __init__(self, codes: int):
        super().__init__()
        self.codebook_size = codes
        self.part = BatchPart()

    @abstractmethod
    def forward(self, z_BDhw: Tensor) -> Quantized:
        """Quantize for training. What it keeps between steps lies in buffers, and changes in training mode alone."""

    @abstractmethod
    def encode(self, z_BDhw: Tensor) -> Tensor:
        """The codes (B, h, w) int64 that `forward` would give, without losses."""

    @abstractmethod
    def lookup(self, codes_Bhw: Tensor) -> Tensor:
        """What the decoder gets for codes in 0..K-1: (B, D, h, w)."""

    def needs_survey(self, tokens: int) -> bool:
        """Whether this step asks for `survey` before passes of so many tokens."""
        return False

    def survey(self, z_ND: Tensor) -> None:
        """See the latents of this process's whole share of a batch, before the first of several pieces is quantized.

        Of a share in one piece, `forward` does this itself.
        """

    def prepare(self, z_ND: Tensor) -> None:
        """What `forward` does first: in a training step of one piece, the survey that is due."""
        if self.training and self.part.pieces == 1 and self.needs_survey(len(z_ND)):
            self.survey(z_ND.detach())

    @torch.no_grad()
    def stats(self, codes_N: Tensor) -> dict[str, Tensor]:
        """The share of codes that occur in a batch, and their perplexity."""
        counts_K = torch.bincount(codes_N, minlength=self.codebook_size)
        return {"usage": (counts_K > 0).float().mean(), "perplexity": perplexity(counts_K)}

    def check_codes(self, codes: Tensor) -> None:
        """ValueError where a code is outside 0..K-1."""
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(
                f"codes are between {int(codes.min())} and {int(codes.max())}, expected 0 to {self.codebook_size - 1}"
            )
