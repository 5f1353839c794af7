"""A classifier of small images: four convolutions, a tanh feature vector, a linear head.

Tanh bounds the features, so that outliers do not dominate a Frechet distance.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from models.classifiers.config import ConvolutionalClassifierConfig

# Shapes: B images, C colour channels, H W pixels, E features, L classes
GROUPS = 8


class ConvolutionalClassifier(nn.Module):
    """Images in [0,1] to features in (-1,1) and logits."""

    def __init__(self, config: ConvolutionalClassifierConfig):
        super().__init__()
        self.config = config
        first, *wider = config.widths
        stages = [convolve(width, next_width, stride=2) for width, next_width in pairwise((first, *wider[:-1]))]
        self.trunk = nn.Sequential(
            nn.PixelUnshuffle(2),
            convolve(4 * config.channels, first, stride=1),
            *stages,
            convolve(wider[-2], wider[-1], stride=1),
            nn.Flatten(),
        )
        self.project = nn.Linear(wider[-1] * (config.pixels // 8) ** 2, config.features)
        self.head = nn.Linear(config.features, config.outputs)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, L)."""
        return self.head(self.features(images_BCHW))

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Features (B, E) in (-1,1)."""
        return self.project(self.trunk(2 * images_BCHW - 1)).tanh()

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, *, smoothing: float) -> Tensor:
        """Cross-entropy with label smoothing."""
        return F.cross_entropy(self(images_BCHW), labels_B, label_smoothing=smoothing)


def convolve(width: int, next_width: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, next_width, 3, stride=stride, padding=1), nn.GroupNorm(GROUPS, next_width), nn.SiLU()
    )
