"""The VQGAN autoencoder of taming-transformers (arXiv 2012.09841), as IBQ trains it: attention at the coarsest level.

Module names are those of the published checkpoints; `decoder.up` is indexed by level and runs from the last to the first.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoders.autoencoder import Autoencoder
from models.autoencoders.config import TamingConfig
from models.layers.residual import ResidualBlock, group_norm

# Shapes: B images, C colour channels, H W pixels, F feature channels, h w grid, D latent channels


class Attention(nn.Module):
    """x + attention of one head as wide as x, over all positions."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = group_norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x_BFhw: Tensor) -> Tensor:
        y_BFhw = self.norm(x_BFhw)
        q_B1TF, k_B1TF, v_B1TF = (part(y_BFhw).flatten(2).mT[:, None] for part in (self.q, self.k, self.v))
        y_B1TF = F.scaled_dot_product_attention(q_B1TF, k_B1TF, v_B1TF)
        return x_BFhw + self.proj_out(y_B1TF[:, 0].mT.unflatten(2, x_BFhw.shape[2:]))


class Downsample(nn.Module):
    """Halves the grid; the missing row and column are zeros at the bottom and at the right."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x_BFhw: Tensor) -> Tensor:
        return self.conv(F.pad(x_BFhw, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the grid by repetition, then smooths it."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BFhw: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BFhw, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the level has it."""

    def __init__(self, width_in: int, width_out: int, *, blocks: int, attends: bool):
        super().__init__()
        widths = [width_in] + [width_out] * (blocks - 1)
        self.block = nn.ModuleList([ResidualBlock(width, width_out, bias=True) for width in widths])
        self.attn = nn.ModuleList([Attention(width_out) for _ in range(blocks if attends else 0)])

    def forward(self, x_BFhw: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x_BFhw = block(x_BFhw)
            if self.attn:
                x_BFhw = self.attn[index](x_BFhw)
        return x_BFhw


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, width: int):
        super().__init__()
        self.block_1 = ResidualBlock(width, width, bias=True)
        self.attn_1 = Attention(width)
        self.block_2 = ResidualBlock(width, width, bias=True)

    def forward(self, x_BFhw: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BFhw)))


class Encoder(nn.Module):
    def __init__(self, config: TamingConfig):
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.channels, config.width, 3, padding=1)
        self.down = nn.ModuleList()
        for index, (width_in, width) in enumerate(zip((config.width, *widths), widths, strict=False)):
            level = Level(width_in, width, blocks=config.blocks, attends=index in config.attention_levels)
            if index < last:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.features, 3, padding=1)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x_BFhw = self.conv_in(pixels_BCHW)
        for level in self.down:
            x_BFhw = level(x_BFhw)
            if hasattr(level, "downsample"):
                x_BFhw = level.downsample(x_BFhw)
        return self.conv_out(F.silu(self.norm_out(self.mid(x_BFhw))))


class Decoder(nn.Module):
    def __init__(self, config: TamingConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.features, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for index, (width, width_in) in enumerate(zip(widths, (*widths[1:], widths[-1]), strict=True)):
            level = Level(width_in, width, blocks=config.blocks + 1, attends=index in config.attention_levels)
            if index > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.channels, 3, padding=1)

    def forward(self, x_BFhw: Tensor) -> Tensor:
        x_BFhw = self.mid(self.conv_in(x_BFhw))
        for level in reversed(self.up):
            x_BFhw = level(x_BFhw)
            if hasattr(level, "upsample"):
                x_BFhw = level.upsample(x_BFhw)
        return self.conv_out(F.silu(self.norm_out(x_BFhw)))


class TamingAutoencoder(Autoencoder):
    """With a 1x1 convolution on either side of the quantizer."""

    def __init__(self, config: TamingConfig):
        super().__init__(config, Encoder(config), Decoder(config))
        self.quant_conv = nn.Conv2d(config.features, config.latent, 1)
        self.post_quant_conv = nn.Conv2d(config.latent, config.features, 1)

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(pixels_BCHW))

    def decode(self, z_BDhw: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z_BDhw))
