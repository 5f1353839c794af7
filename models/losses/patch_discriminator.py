"""PatchGAN (arXiv 1611.07004): a small convolutional network with one logit per overlapping patch.

Module names are those of the published checkpoints.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.losses.config import PatchConfig

WIDEST = 8  # times the first width


class PatchDiscriminator(nn.Module):
    """Images in the network's pixel range to one logit per patch, (B, 1, h, w)."""

    def __init__(self, config: PatchConfig, *, channels: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, config.width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = config.width
        for depth in range(1, config.layers + 1):
            wider = config.width * min(2**depth, WIDEST)
            stride = 2 if depth < config.layers else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))
        self.apply(initialise)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.main(pixels_BCHW)


def initialise(module: nn.Module) -> None:
    """Convolutions: weight N(0, 0.02), bias as torch has it.  Norms: weight N(1, 0.02), bias 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
