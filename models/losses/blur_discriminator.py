"""The discriminator of Open-MAGVIT2's 16,384-code tokenizer: downsampling after a fixed blur (arXiv 1904.11486).

Module names are those of the published checkpoints, the kernels included.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.losses.config import BlurConfig

TAPS = (1.0, 3.0, 3.0, 1.0)


class Blur(nn.Module):
    """Each channel blurred and halved; zeros are added as TensorFlow's SAME does, the odd one at the end."""

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor(TAPS)
        self.register_buffer("kernel", (taps[:, None] * taps / taps.sum() ** 2)[None, None])

    def forward(self, x_BFhw: Tensor) -> Tensor:
        height, width = x_BFhw.shape[2:]
        padded_BFhw = F.pad(x_BFhw, (1, 1 + width % 2, 1, 1 + height % 2))
        kernels = self.kernel.expand(x_BFhw.shape[1], -1, -1, -1)
        return F.conv2d(padded_BFhw, kernels, stride=2, groups=x_BFhw.shape[1])


class BlurDiscriminator(nn.Module):
    """Images in the network's pixel range to one logit per position, (B, 1, h, w)."""

    def __init__(self, config: BlurConfig, *, channels: int):
        super().__init__()
        widths = [config.width] + [config.width * 2**stage for stage in range(config.stages)]
        self.block_in = nn.Sequential(nn.Conv2d(channels, config.width, 5, padding=2), nn.LeakyReLU(0.1))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(width, wider, 3, padding=1),
                    Blur() if config.resample == "blur" else nn.AvgPool2d(2),
                    nn.GroupNorm(32, wider),
                    nn.LeakyReLU(0.1),
                )
                for width, wider in pairwise(widths)
            )
        )
        self.to_logits = nn.Sequential(
            nn.Conv2d(widths[-1], widths[-1], 1), nn.LeakyReLU(0.1), nn.Conv2d(widths[-1], 1, 5, padding=2)
        )

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.to_logits(self.blocks(self.block_in(pixels_BCHW)))
