"""Pixel losses: mean absolute and mean squared error."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.losses.config import ReconstructionConfig


class ReconstructionLoss(nn.Module):
    """Named, weighted scalars whose sum is the loss."""

    def __init__(self, config: ReconstructionConfig):
        super().__init__()
        self.config = config

    def forward(self, reconstruction_BCHW: Tensor, pixels_BCHW: Tensor) -> dict[str, Tensor]:
        terms = {"l1": (self.config.l1, F.l1_loss), "l2": (self.config.l2, F.mse_loss)}
        return {
            name: weight * loss(reconstruction_BCHW, pixels_BCHW) for name, (weight, loss) in terms.items() if weight
        }
