"""What every quantizer returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Quantized(NamedTuple):
    """A quantized latent grid.

    z_BDhw: what the decoder gets; gradients reach the encoder through it.
    codes_Bhw: int64 codes.
    losses: named scalars that carry the quantizer's own weights: their sum is its share of the training loss.
    stats: named scalars without gradient, for the log.
    """

    z_BDhw: Tensor
    codes_Bhw: Tensor
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]
