"""The VQGAN autoencoder of MaskGIT (arXiv 2202.04200), also MAGE's: no attention, averaging instead of strides.

Module names are those of the published MaskGIT checkpoint; `decoder.up` is indexed by level and runs from the last to
the first. The shortcut of a block that changes the width is the odd one of `ResidualBlock`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoders.autoencoder import Autoencoder
from models.autoencoders.config import MaskgitConfig
from models.layers.residual import ResidualBlock, group_norm

# Shapes: B images, C colour channels, H W pixels, F feature channels, h w grid, D latent channels


class Level(nn.Module):
    """Residual blocks at one resolution."""

    def __init__(self, width_in: int, width_out: int, *, blocks: int):
        super().__init__()
        self.block = nn.Sequential(
            *(residual_block(width, width_out) for width in [width_in] + [width_out] * (blocks - 1))
        )

    def forward(self, x_BFhw: Tensor) -> Tensor:
        return self.block(x_BFhw)


class Encoder(nn.Module):
    def __init__(self, config: MaskgitConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.channels, config.width, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            [
                Level(width_in, width, blocks=config.blocks)
                for width_in, width in zip((config.width, *widths), widths, strict=False)
            ]
        )
        self.mid = middle(widths[-1], blocks=config.middle_blocks)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent, 1)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x_BFhw = self.down[0](self.conv_in(pixels_BCHW))
        for level in self.down[1:]:
            x_BFhw = level(F.avg_pool2d(x_BFhw, 2))
        return self.conv_out(F.silu(self.norm_out(self.mid(x_BFhw))))


class Decoder(nn.Module):
    def __init__(self, config: MaskgitConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.latent, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], blocks=config.middle_blocks)
        self.up = nn.ModuleList()
        for index, (width, width_in) in enumerate(zip(widths, (*widths[1:], widths[-1]), strict=True)):
            level = Level(width_in, width, blocks=config.blocks)
            if index > 0:
                level.upsample_conv = nn.Conv2d(width, width, 3, padding=1)
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.channels, 3, padding=1)

    def forward(self, z_BDhw: Tensor) -> Tensor:
        x_BFhw = self.mid(self.conv_in(z_BDhw))
        for level in reversed(self.up):
            x_BFhw = level(x_BFhw)
            if hasattr(level, "upsample_conv"):
                x_BFhw = level.upsample_conv(F.interpolate(x_BFhw, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x_BFhw)))


class MaskgitAutoencoder(Autoencoder):
    def __init__(self, config: MaskgitConfig):
        super().__init__(config, Encoder(config), Decoder(config))


def residual_block(width_in: int, width_out: int) -> ResidualBlock:
    return ResidualBlock(width_in, width_out, bias=False, shortcut="branch")


def middle(width: int, *, blocks: int) -> nn.Sequential:
    return nn.Sequential(*(residual_block(width, width) for _ in range(blocks)))
