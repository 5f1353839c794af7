"""The interface of the quantizers: what every one of them takes and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

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
    """Latents to codes and back. Built as `Quantizer(config, dim=D)`; a subclass passes on its number of codes."""

    def __init__(self, codes: int):
        super().__init__()
        self.codebook_size = codes

    @abstractmethod
    def forward(self, z_BDhw: Tensor) -> Quantized:
        """Quantize for training. What it keeps between steps lies in buffers, and changes in training mode alone."""

    @abstractmethod
    def encode(self, z_BDhw: Tensor) -> Tensor:
        """The codes (B, h, w) int64 that `forward` would give, without losses."""

    @abstractmethod
    def lookup(self, codes_Bhw: Tensor) -> Tensor:
        """What the decoder gets for codes in 0..K-1: (B, D, h, w)."""

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
