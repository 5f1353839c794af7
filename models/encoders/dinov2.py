"""DINOv2 with register tokens as a feature encoder: patch features of one block of timm's vision transformer.

Positions are resampled as the published code does (bicubic, scale factors with offset 0.1, no antialiasing), because
timm's own resampling moves features by a tenth of their size at 224 pixels.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders.config import Dinov2Config

# Shapes: B images, C colour channels, H W pixels, h w patches, S rows and columns of the position table, D features
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SHRINK = 0.875  # images of 8/7 of the size are resized by it after normalization, as published (256 to 224)
OFFSET = 0.1  # added to the grid before the scale is taken; part of the published weights' behaviour


class Dinov2(nn.Module):
    """Images in [0,1] of the config's size, or of 8/7 of it, to patch features (B, h, w, D)."""

    def __init__(self, config: Dinov2Config, **overrides: Any):
        """overrides: sizes of timm's transformer (embed_dim, depth, num_heads), which tests use to make it tiny."""
        super().__init__()
        self.config = config
        self.transformer = timm.create_model(
            config.timm_name, pretrained=False, img_size=config.image_size, num_classes=0, **overrides
        )
        self.dims = self.transformer.embed_dim
        self.register_buffer("mean_C11", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std_C11", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        block, blocks = self.config.block, len(self.transformer.blocks)
        images_BCHW = (images_BCHW - self.mean_C11) / self.std_C11
        if images_BCHW.shape[-1] != self.config.image_size:
            images_BCHW = F.interpolate(images_BCHW, scale_factor=SHRINK, mode="bicubic", antialias=False)
        features_BDhw = self.transformer.forward_intermediates(
            images_BCHW,
            indices=[block if block >= 0 else blocks + block],
            norm=self.config.norm,
            stop_early=True,
            intermediates_only=True,
        )[0]
        return features_BDhw.permute(0, 2, 3, 1)

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Load weights in timm's names at any image size; the position table is resampled to ours."""
        grid = self.config.grid
        table = state["pos_embed"]
        if self.config.interpolation == "timm":
            table = timm.layers.resample_abs_pos_embed(table, list(grid), num_prefix_tokens=0)
        else:
            table = resample_positions(table, grid)
        self.transformer.load_state_dict({**state, "pos_embed": table})


def resample_positions(table_1ND: Tensor, grid: tuple[int, int]) -> Tensor:
    """A square table of patch positions (1, S*S, D) to (1, h*w, D), as the published code interpolates."""
    rows = int(table_1ND.shape[1] ** 0.5)
    if grid == (rows, rows):
        return table_1ND
    table_1DSS = table_1ND.float().reshape(1, rows, rows, -1).permute(0, 3, 1, 2)
    scales = [(side + OFFSET) / rows for side in grid]
    resampled_1Dhw = F.interpolate(table_1DSS, scale_factor=scales, mode="bicubic", antialias=False)
    return resampled_1Dhw.flatten(2).transpose(1, 2).to(table_1ND.dtype)
