"""Base of all autoencoders: an encoder, a decoder, and the weight at which adversarial gradients are measured."""

from __future__ import annotations

from torch import Tensor, nn

from models.config import Config


class Autoencoder(nn.Module):
    """Images (B, C, H, W) in the config's pixel range to latents (B, D, h, w) and back; the output is not clamped."""

    def __init__(self, config: Config, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.decoder = decoder

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        return self.encoder(pixels_BCHW)

    def decode(self, z_BDhw: Tensor) -> Tensor:
        return self.decoder(z_BDhw)

    @property
    def last_weight(self) -> Tensor:
        """Weight of the last convolution, whose gradients set an adaptive weight of the adversarial loss."""
        return [module for module in self.decoder.modules() if isinstance(module, nn.Conv2d)][-1].weight
