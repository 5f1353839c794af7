"""Published Open-MAGVIT2 tokenizers: Lightning checkpoints with losses and averages, or the bare tokenizer; strict."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from models.adapters.layout import ANY, Difference, LayoutError, shapes
from models.adapters.tokenizers import TokenizerWeights, adapt, has_averages, network_weights, read_levels, require
from models.autoencoders.config import Magvit2Config
from models.quantizers.config import LookupFreeConfig
from models.tokenizer_config import TokenizerConfig

__all__ = ["has_averages", "recognise"]

SUBJECT = "an Open-MAGVIT2 tokenizer"
PUBLISHED_BITS, MOST_BITS = 18, 24  # of a code; more channels are those of another quantizer


def recognise(state: Mapping[str, Tensor], *, averaged: bool = True) -> TokenizerWeights:
    """Read sizes from shapes, check every tensor, rename. The published metrics are those of the averaged weights.

    Raises LayoutError with all that is missing, surplus or misshapen.
    """
    state = network_weights(state, averaged=averaged and has_averages(state))
    found = shapes(state)
    require(found, {"encoder.conv_out.weight": 4}, SUBJECT)
    bits = found["encoder.conv_out.weight"][0]
    if bits > MOST_BITS:
        wanted = (PUBLISHED_BITS, ANY, ANY, ANY)
        raise LayoutError(SUBJECT, [Difference("encoder.conv_out.weight", found["encoder.conv_out.weight"], wanted)])
    config = TokenizerConfig(
        autoencoder=Magvit2Config(**read_levels(found, SUBJECT), latent=bits),
        quantizer=LookupFreeConfig(),
        rounding="truncate",
    )
    return adapt(state, config, subject=SUBJECT, published=str)
