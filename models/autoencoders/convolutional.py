"""A small convolutional autoencoder: pixel-unshuffle stem, strided convolutions, residual blocks, pixel-shuffle output.

The stem and its mirror image move pixels into channels, so that no convolution runs at full resolution: on a CPU
that is most of the cost. Sub-pixel upsampling as in Shi et al. 2016 (arXiv 1609.05158).
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from models.autoencoders.autoencoder import Autoencoder
from models.autoencoders.config import ConvolutionalConfig

# Shapes: B images, C colour channels, H W pixels, D latent channels, h w latent grid, F feature channels


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), width kept."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.GroupNorm(groups, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(groups, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x_BFhw: Tensor) -> Tensor:
        return x_BFhw + self.branch(x_BFhw)


class ConvolutionalAutoencoder(Autoencoder):
    def __init__(self, config: ConvolutionalConfig):
        super().__init__(config, build_encoder(config), build_decoder(config))


def build_encoder(config: ConvolutionalConfig) -> nn.Sequential:
    first, last = config.widths[0], config.widths[-1]
    layers: list[nn.Module] = [
        nn.PixelUnshuffle(config.stem),
        nn.Conv2d(config.channels * config.stem**2, first, 3, padding=1),
        *residual_blocks(config, first),
    ]
    for width, wider in pairwise(config.widths):
        layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), *residual_blocks(config, wider)]
    return nn.Sequential(*layers, nn.GroupNorm(config.groups, last), nn.SiLU(), nn.Conv2d(last, config.latent, 1))


def build_decoder(config: ConvolutionalConfig) -> nn.Sequential:
    widths = config.widths[::-1]
    layers: list[nn.Module] = [nn.Conv2d(config.latent, widths[0], 3, padding=1), *residual_blocks(config, widths[0])]
    for width, narrower in pairwise(widths):
        layers += [nn.Conv2d(width, 4 * narrower, 3, padding=1), nn.PixelShuffle(2), *residual_blocks(config, narrower)]
    return nn.Sequential(
        *layers,
        nn.GroupNorm(config.groups, widths[-1]),
        nn.SiLU(),
        nn.Conv2d(widths[-1], config.channels * config.stem**2, 3, padding=1),
        nn.PixelShuffle(config.stem),
    )


def residual_blocks(config: ConvolutionalConfig, width: int) -> list[nn.Module]:
    return [ResidualBlock(width, config.groups) for _ in range(config.blocks)]
