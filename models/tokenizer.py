"""A tokenizer is an autoencoder with a quantizer in its middle: images in [0,1] to codes and back.

The pixel range of the network is internal: images outside are in [0,1].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.autoencoders.config import BUILDERS as AUTOENCODERS
from models.quantizers.config import BUILDERS as QUANTIZERS
from models.quantizers.quantizer import Quantized, Quantizer
from models.registry import build
from models.tokenizer_config import Rounding, TokenizerConfig

# Shapes: B images, C colour channels, H W pixels, D latent channels, h w grid of codes
DECODING = ("autoencoder.decoder.", "autoencoder.post_quant_conv.")  # parameters that turn codes into images, by name


class Tokenizer(nn.Module):
    """Images to codes, codes to images."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.autoencoder = build(config.autoencoder, AUTOENCODERS)
        self.quantizer = build(config.quantizer, QUANTIZERS, dim=config.autoencoder.latent)
        self.codebook_size = config.codebook_size
        self.downsample = config.downsample
        self.rounding = config.rounding

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of codes of an image of this size."""
        return self.config.grid(height, width)

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Images in [0,1] to int64 codes (B, h, w)."""
        return self.quantizer.encode(self.autoencoder.encode(self.to_pixels(images_BCHW)))

    @torch.no_grad()
    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Codes (B, h, w) to images in [0,1]; ValueError for a code that the codebook does not have."""
        self.quantizer.check_codes(codes_Bhw)
        return self.to_images(self.autoencoder.decode(self.quantizer.lookup(codes_Bhw)))

    def to_pixels(self, images_BCHW: Tensor) -> Tensor:
        """[0,1] to the network's pixel range."""
        return images_BCHW if self.config.autoencoder.pixel_range == "0..1" else 2 * images_BCHW - 1

    def to_images(self, pixels_BCHW: Tensor) -> Tensor:
        """The network's pixel range to [0,1], clamped."""
        is_unit = self.config.autoencoder.pixel_range == "0..1"
        return (pixels_BCHW if is_unit else (pixels_BCHW + 1) / 2).clamp(0, 1)


class Reconstructed(NamedTuple):
    """The results of a training pass through a tokenizer.

    losses: weighted, named scalars; the training loss is their sum, with an adversarial term on top.
    stats: named scalars for the log, without gradient.
    reconstruction_loss: the part of the losses that compares images; an adaptive adversarial weight depends on it.
    pixels_BCHW, output_BCHW: images and reconstructions in the network's range, the latter with gradient.
    """

    losses: dict[str, Tensor]
    stats: dict[str, Tensor]
    reconstruction_loss: Tensor
    pixels_BCHW: Tensor
    output_BCHW: Tensor


class TokenizerPass(nn.Module):
    """A tokenizer and its loss as one module, for data parallel training."""

    def __init__(self, tokenizer: Tokenizer, loss: nn.Module):
        super().__init__()
        self.tokenizer = tokenizer
        self.loss = loss

    def forward(self, images_BCHW: Tensor) -> Reconstructed:
        """Images in [0,1]; in training mode the quantizer updates its statistics."""
        pixels_BCHW = self.tokenizer.to_pixels(images_BCHW)
        quantized = self.quantize(pixels_BCHW)
        output_BCHW = self.tokenizer.autoencoder.decode(quantized.z_BDhw)
        losses = self.loss(output_BCHW, pixels_BCHW)
        loss = torch.stack(list(losses.values())).sum()
        return Reconstructed(losses | quantized.losses, quantized.stats, loss, pixels_BCHW, output_BCHW)

    def quantize(self, pixels_BCHW: Tensor) -> Quantized:
        return self.tokenizer.quantizer(self.tokenizer.autoencoder.encode(pixels_BCHW))


class DecoderPass(TokenizerPass):
    """The same with only the decoder trained: codes of images do not change, and the quantizer has no losses."""

    def __init__(self, tokenizer: Tokenizer, loss: nn.Module):
        super().__init__(tokenizer, loss)
        for name, parameter in tokenizer.named_parameters():
            parameter.requires_grad_(name.startswith(DECODING))

    @torch.no_grad()
    def quantize(self, pixels_BCHW: Tensor) -> Quantized:
        quantizer = self.tokenizer.quantizer
        codes_Bhw = quantizer.encode(self.tokenizer.autoencoder.encode(pixels_BCHW))
        stats = Quantizer.stats(quantizer, codes_Bhw.flatten())  # of these images: the running use does not change
        return Quantized(quantizer.lookup(codes_Bhw), codes_Bhw, {}, stats)


def to_bytes(images_BCHW: Tensor, rounding: Rounding) -> Tensor:
    """Images in [0,1] to uint8, rounded to nearest (half to even) or truncated as the published system does."""
    scaled_BCHW = images_BCHW.clamp(0, 1) * 255
    return (scaled_BCHW.round() if rounding == "round" else scaled_BCHW).to(torch.uint8)
