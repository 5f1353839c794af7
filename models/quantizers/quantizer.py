"""The interface of the quantizers."""

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

    z_BDhw: input of the decoder; gradients reach the encoder through it.
    codes_Bhw: int64 codes.
    losses: named scalars, weighted by the quantizer's config; their sum is its term of the training loss.
    stats: named scalars without gradient, for the log; those of `Quantizer.stats` are among them.
    """

    z_BDhw: Tensor
    codes_Bhw: Tensor
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]


class Quantizer(nn.Module, ABC):
    """Latents to codes and back. Built as `Quantizer(config, dim=D)`; a subclass passes on its number of codes.

    part: the part of a batch in the next pass. With gradient accumulation or several processes the training sets it before
    each pass. State that changes once per step changes with the last piece.
    """

    def __init__(self, codes: int):
        super().__init__()
        self.codebook_size = codes
        self.part = BatchPart()

    @abstractmethod
    def forward(self, z_BDhw: Tensor) -> Quantized:
        """Quantize for training. State between steps is in buffers, and changes in training mode only."""

    @abstractmethod
    def encode(self, z_BDhw: Tensor) -> Tensor:
        """The codes (B, h, w) int64 that `forward` would give, without losses."""

    @abstractmethod
    def lookup(self, codes_Bhw: Tensor) -> Tensor:
        """Input of the decoder for codes in 0..K-1: (B, D, h, w)."""

    def needs_survey(self, tokens: int) -> bool:
        """Whether `survey` is needed in this step, before passes of `tokens` tokens."""
        return False

    def survey(self, z_ND: Tensor) -> None:
        """Collect statistics of the latents (N, D) of this process's share of a batch, before its first piece is quantized.

        `forward` calls it if the share is one piece.
        """

    def prepare(self, z_ND: Tensor) -> None:
        """Called first by `forward`: the survey of a training step of one piece."""
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
