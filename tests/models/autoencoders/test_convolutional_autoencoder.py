"""Convolutional autoencoder: grid, stem, gradients."""

from __future__ import annotations

import pytest
import torch

from models.autoencoders.config import BUILDERS, ConvolutionalConfig
from models.registry import build


@pytest.mark.parametrize(("stem", "widths", "side"), [(2, (8, 16, 16), 4), (4, (16, 8), 4), (1, (8,), 32)])
def test_latents_have_the_promised_grid(stem: int, widths: tuple[int, ...], side: int) -> None:
    config = ConvolutionalConfig(stem=stem, widths=widths, latent=5, blocks=2, channels=1)
    autoencoder = build(config, BUILDERS)
    pixels_BCHW = torch.randn(2, 1, 32, 32)
    z_BDhw = autoencoder.encode(pixels_BCHW)
    assert z_BDhw.shape == (2, 5, side, side)
    assert side * config.downsample == 32
    assert autoencoder.decode(z_BDhw).shape == pixels_BCHW.shape


def test_every_parameter_is_trained() -> None:
    autoencoder = build(ConvolutionalConfig(widths=(8, 16)), BUILDERS)
    pixels_BCHW = torch.randn(2, 3, 16, 16)
    (autoencoder.decode(autoencoder.encode(pixels_BCHW)) - pixels_BCHW).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in autoencoder.parameters())
