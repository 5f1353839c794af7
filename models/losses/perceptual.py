"""LPIPS (arXiv 1801.03924): distance of two images in the features of a VGG16 that was trained on ImageNet.

The network is frozen and not registered as a submodule: parameters, checkpoints and averages do not contain its 59 MB. It is
moved between devices with the module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from models.autoencoders.config import PixelRange

# Shapes: B images, C colour channels, H W pixels, F feature channels, h w grid of features
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and spread, for pixels in [-1, 1]
TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 among torchvision's layers
WIDTHS = (64, 128, 256, 512, 512)
EPSILON = 1e-10


class Lpips(nn.Module):
    """Distances (B,) of images in `pixel_range`.

    features: weights of torchvision's vgg16, named by layer ("0.weight", ...).  heads: five non-negative rows, one
    weight per feature channel. Both come from `models.adapters.lpips`. The heads' dropout is for their own training.
    """

    def __init__(self, features: Mapping[str, Tensor], heads: list[Tensor], *, pixel_range: PixelRange):
        super().__init__()
        self.is_unit = pixel_range == "0..1"
        self.frozen = [Features(features, heads)]  # in a list, so that it is not registered

    def forward(self, first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
        if self.is_unit:
            first_BCHW, second_BCHW = 2 * first_BCHW - 1, 2 * second_BCHW - 1
        return self.frozen[0](first_BCHW, second_BCHW)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.frozen[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)


class Features(nn.Module):
    """The frozen part: VGG16 up to relu5_3, and the heads."""

    def __init__(self, features: Mapping[str, Tensor], heads: list[Tensor]):
        super().__init__()
        with torch.device("meta"):
            self.layers = make_layers(cfgs["D"])[: TAPS[-1] + 1]
        self.layers.load_state_dict(dict(features), strict=True, assign=True)
        self.heads = nn.ParameterList([nn.Parameter(head.flatten()) for head in heads])
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
        """Sum over the taps of the mean over positions of the weighted squared difference of unit features."""
        images = len(first_BCHW)
        x_BFhw = (torch.cat([first_BCHW, second_BCHW]) - self.shift) / self.scale
        distances_B = first_BCHW.new_zeros(images)
        for index, layer in enumerate(self.layers):
            x_BFhw = layer(x_BFhw)
            if index in TAPS:
                unit_BFhw = unit(x_BFhw)
                squares_BFhw = (unit_BFhw[:images] - unit_BFhw[images:]).square()
                head_F = self.heads[TAPS.index(index)]
                distances_B = distances_B + torch.einsum("bfhw,f->bhw", squares_BFhw, head_F).mean((1, 2))
        return distances_B


def unit(x_BFhw: Tensor) -> Tensor:
    """Features of length 1 at every position; where all are 0 they stay 0, also in the gradient."""
    return x_BFhw / (torch.linalg.vector_norm(x_BFhw, dim=1, keepdim=True) + EPSILON)
