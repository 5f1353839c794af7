"""The autoencoder of Open-MAGVIT2 (arXiv 2409.04410): convolutions only; the decoder is modulated by the latent.

Module names are those of the published checkpoints; `decoder.up` and `decoder.adaptive` are indexed by level and run
from the last to the first.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoders.autoencoder import Autoencoder
from models.autoencoders.config import Magvit2Config
from models.layers.residual import ResidualBlock, group_norm

# Shapes: B images, C colour channels, H W pixels, F feature channels, h w grid, D latent channels


def residual_blocks(width_in: int, width_out: int, blocks: int) -> nn.ModuleList:
    widths = [width_in] + [width_out] * (blocks - 1)
    return nn.ModuleList([ResidualBlock(width, width_out, bias=False) for width in widths])


class Level(nn.Module):
    """Residual blocks at one resolution."""

    def __init__(self, width_in: int, width_out: int, *, blocks: int):
        super().__init__()
        self.block = residual_blocks(width_in, width_out, blocks)

    def forward(self, x_BFhw: Tensor) -> Tensor:
        return run(self.block, x_BFhw)


class AdaptiveNorm(nn.Module):
    """Group normalisation whose scale and shift come from mean and spread of the latent over all positions.

    A latent of a single position has no spread: the output is NaN there, as published.
    """

    def __init__(self, latent: int, width: int):
        super().__init__()
        self.norm = group_norm(width, affine=False)
        self.gamma = nn.Linear(latent, width)
        self.beta = nn.Linear(latent, width)

    def forward(self, x_BFhw: Tensor, style_BDhw: Tensor) -> Tensor:
        spread_BD = (style_BDhw.var((2, 3)) + 1e-6).sqrt()
        scale_BF, shift_BF = self.gamma(spread_BD), self.beta(style_BDhw.mean((2, 3)))
        return self.norm(x_BFhw) * scale_BF[..., None, None] + shift_BF[..., None, None]


class Upsample(nn.Module):
    """Doubles the grid: a convolution to four times the width, channels (row, column, channel) moved into space.

    torch's pixel shuffle reads them as (channel, row, column), so they are put in that order first.
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, 4 * width, 3, padding=1)

    def forward(self, x_BFhw: Tensor) -> Tensor:
        y_BFhw = self.conv1(x_BFhw).unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)
        return F.pixel_shuffle(y_BFhw, 2)


class Encoder(nn.Module):
    def __init__(self, config: Magvit2Config):
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.channels, config.width, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        for index, (width_in, width) in enumerate(zip((config.width, *widths), widths, strict=False)):
            level = Level(width_in, width, blocks=config.blocks)
            if index < last:
                level.downsample = nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.down.append(level)
        self.mid_block = residual_blocks(widths[-1], widths[-1], config.blocks)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent, 1)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x_BFhw = self.conv_in(pixels_BCHW)
        for level in self.down:
            x_BFhw = level(x_BFhw)
            if hasattr(level, "downsample"):
                x_BFhw = level.downsample(x_BFhw)
        return self.conv_out(F.silu(self.norm_out(run(self.mid_block, x_BFhw))))


class Decoder(nn.Module):
    def __init__(self, config: Magvit2Config):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.latent, widths[-1], 3, padding=1)
        self.mid_block = residual_blocks(widths[-1], widths[-1], config.blocks)
        self.up, self.adaptive = nn.ModuleList(), nn.ModuleList()
        for index, (width, width_in) in enumerate(zip(widths, (*widths[1:], widths[-1]), strict=True)):
            level = Level(width_in, width, blocks=config.blocks)
            if index > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
            self.adaptive.append(AdaptiveNorm(config.latent, width_in))
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.channels, 3, padding=1)

    def forward(self, z_BDhw: Tensor) -> Tensor:
        x_BFhw = run(self.mid_block, self.conv_in(z_BDhw))
        for level, adaptive in zip(reversed(self.up), reversed(self.adaptive), strict=True):
            x_BFhw = level(adaptive(x_BFhw, z_BDhw))
            if hasattr(level, "upsample"):
                x_BFhw = level.upsample(x_BFhw)
        return self.conv_out(F.silu(self.norm_out(x_BFhw)))


class Magvit2Autoencoder(Autoencoder):
    def __init__(self, config: Magvit2Config):
        super().__init__(config, Encoder(config), Decoder(config))


def run(layers: nn.ModuleList, x_BFhw: Tensor) -> Tensor:
    for layer in layers:
        x_BFhw = layer(x_BFhw)
    return x_BFhw
