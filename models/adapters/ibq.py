"""Published IBQ tokenizers: Lightning checkpoints with losses and averages, or the bare tokenizer; strict."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from models.adapters.layout import shapes
from models.adapters.tokenizers import (
    CODEBOOK,
    TokenizerWeights,
    adapt,
    has_averages,
    network_weights,
    read_levels,
    require,
)
from models.autoencoders.config import TamingConfig
from models.quantizers.config import IndexBackpropagationConfig
from models.tokenizer_config import TokenizerConfig

__all__ = ["has_averages", "recognise"]

SUBJECT = "an IBQ tokenizer"


def recognise(state: Mapping[str, Tensor], *, averaged: bool = True) -> TokenizerWeights:
    """Read sizes from shapes, check every tensor, rename. The published metrics are those of the averaged weights.

    Raises LayoutError with all that is missing, surplus or misshapen.
    """
    state = network_weights(state, averaged=averaged and has_averages(state))
    found = shapes(state)
    require(found, {CODEBOOK: 2, "quant_conv.weight": 4}, SUBJECT)
    levels = read_levels(found, SUBJECT)
    latent, features = found["quant_conv.weight"][:2]
    attention = [i for i in range(len(levels["multipliers"])) if f"encoder.down.{i}.attn.0.norm.weight" in found]
    config = TokenizerConfig(
        autoencoder=TamingConfig(**levels, features=features, latent=latent, attention_levels=tuple(attention)),
        quantizer=IndexBackpropagationConfig(codes=found[CODEBOOK][0]),
        rounding="truncate",
    )
    return adapt(state, config, subject=SUBJECT, published=str)
