"""Losses between an image and its reconstruction: of pixels, and (optionally) of a perceptual network."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from models.losses.config import ReconstructionConfig

Distance = Callable[[Tensor, Tensor], Tensor]


class ReconstructionLoss(nn.Module):
    """Named, weighted scalars whose sum is the loss.

    perceptual: a distance of two batches of images (`Lpips` with its weights). Raises ValueError if the config gives it
    a weight and it is not there.
    """

    def __init__(self, config: ReconstructionConfig, *, perceptual: nn.Module | None = None):
        super().__init__()
        if config.perceptual and perceptual is None:
            raise ValueError(
                f"the loss has perceptual: {config.perceptual}, but no perceptual network was given: build Lpips with the "
                "weights of torchvision's vgg16 and of the heads in the package lpips, or set perceptual to 0"
            )
        self.config = config
        self.perceptual = perceptual

    def forward(self, reconstruction_BCHW: Tensor, pixels_BCHW: Tensor) -> dict[str, Tensor]:
        config = self.config
        terms: dict[str, tuple[float, Distance | None]] = {
            "l1": (config.l1, F.l1_loss),
            "l2": (config.l2, F.mse_loss),
            "perceptual": (config.perceptual, self.perceptual),
        }
        return {
            name: weight * distance(reconstruction_BCHW, pixels_BCHW).mean()
            for name, (weight, distance) in terms.items()
            if weight and distance is not None
        }
