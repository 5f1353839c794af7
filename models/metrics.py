"""Metrics that are functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(images_BCHW: Tensor, references_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB (B,); both in [0,1]; equal images give inf."""
    errors_B = (images_BCHW.double() - references_BCHW.double()).square().flatten(1).mean(1)
    return -10 * errors_B.log10()


def perplexity(counts_K: Tensor) -> Tensor:
    """Exponential of the entropy of a histogram of codes: between 1 and K; 1 for an empty histogram."""
    share_K = counts_K / counts_K.sum().clamp_min(1)
    return torch.exp(torch.special.entr(share_K).sum())
