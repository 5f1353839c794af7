"""The residual block of the VQGAN family (arXiv 2012.09841), in the three forms that published weights have."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

# Shapes: B images, F G feature channels, h w grid
Shortcut = Literal["input", "branch"]


def group_norm(width: int, *, affine: bool = True) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6, affine=affine)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))).

    Where the width changes, a 1x1 convolution projects the block's input, or (shortcut "branch") the branch, which is then
    added to itself and the input dropped: MaskGIT's weights were trained like that.
    """

    def __init__(self, width_in: int, width_out: int, *, bias: bool, shortcut: Shortcut = "input"):
        super().__init__()
        self.shortcut = shortcut
        self.norm1 = group_norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1, bias=bias)
        self.norm2 = group_norm(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=bias)
        if width_in != width_out:
            width_from = width_in if shortcut == "input" else width_out
            self.nin_shortcut = nn.Conv2d(width_from, width_out, 1, bias=bias)

    def forward(self, x_BFhw: Tensor) -> Tensor:
        branch_BGhw = self.conv1(F.silu(self.norm1(x_BFhw)))
        branch_BGhw = self.conv2(F.silu(self.norm2(branch_BGhw)))
        if not hasattr(self, "nin_shortcut"):
            return x_BFhw + branch_BGhw
        return branch_BGhw + self.nin_shortcut(x_BFhw if self.shortcut == "input" else branch_BGhw)
