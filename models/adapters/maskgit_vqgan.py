"""Published weights of the MaskGIT-VQGAN, in the names of RAR's file or in those of MAGE's, which DiGIT uses; strict."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from models.adapters.layout import shapes
from models.adapters.tokenizers import CODEBOOK, TokenizerWeights, adapt, count, read_levels, require, tokenizer_part
from models.autoencoders.config import MaskgitConfig
from models.quantizers.config import VectorConfig
from models.tokenizer_config import TokenizerConfig

SUBJECT = "a MaskGIT-VQGAN tokenizer"


def recognise(state: Mapping[str, Tensor]) -> TokenizerWeights:
    """Read sizes from shapes, check every tensor, rename.

    Raises LayoutError with all that is missing, surplus or misshapen.
    """
    state = tokenizer_part(state)
    found = shapes(state)
    require(found, {CODEBOOK: 2}, SUBJECT)
    codes, latent = found[CODEBOOK]
    is_mage = any(".mid.block_" in name for name in found)
    config = TokenizerConfig(
        autoencoder=MaskgitConfig(
            **read_levels(found, SUBJECT), middle_blocks=max(1, count(found, "encoder.mid.")), latent=latent
        ),
        quantizer=VectorConfig(codes=codes, beta_on="codebook", init="uniform"),
        rounding="truncate",
    )
    return adapt(state, config, subject=SUBJECT, published=mage_name if is_mage else str)


def mage_name(name: str) -> str:
    """Middle blocks are counted from 1, and the convolution after an upsampling is a part of it."""
    name = re.sub(r"\.mid\.(\d+)\.", lambda match: f".mid.block_{int(match[1]) + 1}.", name)
    return name.replace(".upsample_conv.", ".upsample.conv.")
