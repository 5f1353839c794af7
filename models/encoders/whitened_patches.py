"""PCA-whitened local patches as features.

Every cell of a grid is described by the patch of pixels around it, projected on the leading principal components of all
patches of the image set and scaled to variance 1. Fitting is one pass in a fixed order in float64, with the sign of
each component fixed, so that the same images give the same state.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders.config import WhitenedPatchesConfig

# Shapes: B images, C colour channels, H W pixels, h w cells, N patches, P values of a patch, D features


class WhitenedPatches(nn.Module):
    """Images in [0,1] to features (B, h, w, D); the fitted state comes in through load_state_dict."""

    def __init__(self, config: WhitenedPatchesConfig):
        super().__init__()
        self.config = config
        self.dims = config.dims
        values = config.channels * config.patch**2
        self.register_buffer("mean_P", torch.zeros(values))
        self.register_buffer("projection_PD", torch.zeros(values, config.dims))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        features_ND = (patches(images_BCHW, self.config) - self.mean_P) @ self.projection_PD
        return features_ND.reshape(len(images_BCHW), *self.config.grid, self.config.dims)

    def fit(self, batches: Iterable[Tensor]) -> dict[str, Tensor]:
        """Take the statistics of all images (batches in [0,1]), use them, and return them as a state dict."""
        fitting = WhitenedPatchesFit(self.config)
        for images_BCHW in batches:
            fitting.add(images_BCHW)
        state = fitting.finish()
        self.load_state_dict(state)
        return state


class WhitenedPatchesFit:
    """Running sums of the patches; the order of `add` affects the last bits of the result."""

    def __init__(self, config: WhitenedPatchesConfig):
        values = config.channels * config.patch**2
        self.config = config
        self.patches = 0
        self.sum_P = torch.zeros(values, dtype=torch.float64)
        self.products_PP = torch.zeros(values, values, dtype=torch.float64)

    def add(self, images_BCHW: Tensor) -> None:
        patches_NP = patches(images_BCHW.cpu().double(), self.config)
        self.patches += len(patches_NP)
        self.sum_P += patches_NP.sum(0)
        self.products_PP += patches_NP.T @ patches_NP

    def finish(self) -> dict[str, Tensor]:
        """State of a WhitenedPatches: mean and projection, float32."""
        if self.patches == 0:
            raise ValueError("whitened patches cannot be fitted: no image was given")
        mean_P = self.sum_P / self.patches
        covariance_PP = self.products_PP / self.patches - torch.outer(mean_P, mean_P)
        return {"mean_P": mean_P.float(), "projection_PD": whitening(covariance_PP, self.config).float()}


def patches(images_BCHW: Tensor, config: WhitenedPatchesConfig) -> Tensor:
    """All patches of a batch, (N, P), images first, then rows, then columns; borders repeat their last pixel."""
    stride = config.image_size // config.cells
    margin = (config.patch - stride) // 2
    padded_BCHW = F.pad(images_BCHW, (margin,) * 4, mode="replicate")
    patches_BPN = F.unfold(padded_BCHW, config.patch, stride=stride)
    return patches_BPN.transpose(1, 2).reshape(-1, patches_BPN.shape[1])


def whitening(covariance_PP: Tensor, config: WhitenedPatchesConfig) -> Tensor:
    """Leading eigenvectors (P, D), largest variance first, divided by the standard deviation along each."""
    variances_P, vectors_PP = torch.linalg.eigh(covariance_PP)  # ascending
    variances_D = variances_P.flip(0)[: config.dims]
    vectors_PD = vectors_PP.flip(1)[:, : config.dims]
    largest_D = vectors_PD.gather(0, vectors_PD.abs().argmax(0, keepdim=True)).squeeze(0)
    scales_D = (variances_D.clamp_min(0) + config.noise * variances_D[0]).rsqrt()
    return vectors_PD * largest_D.sign() * scales_D
