"""Published RAR weights: bare state dicts in our parameter names; sizes are read from shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from models.adapters.layout import GeneratorWeights, LayoutError, Shape, compare, shapes
from models.adapters.tokenizers import rank_differences, require
from models.generators.config import SIZES, SPARE_POSITIONS, CodeShape, RarConfig
from models.generators.rar.network import Rar

# Rank of each tensor that the sizes are read from.
RANKS = {
    "cls_token": 3,
    "pos_embed": 3,
    "embeddings.weight": 2,
    "lm_head.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
    "blocks.0.attn.q_norm.weight": 1,
}


def recognise(state: Mapping[str, Tensor]) -> GeneratorWeights:
    """Read sizes from shapes and check every tensor. Raises LayoutError with all that is missing, surplus, misshapen."""
    found = shapes(state)
    config, shape = _read_sizes(found)
    with torch.device("meta"):
        network = Rar(config, shape)
    differences = compare(found, shapes(network.state_dict()))
    if differences:
        raise LayoutError(f"a RAR generator {config.layers} layers deep and {config.width} wide", differences)
    numbers = config.model_dump(include=set(SIZES["b"]))
    size = next((name for name, published in SIZES.items() if published == numbers), None)
    return GeneratorWeights(config, shape, state, size)


def _read_sizes(found: Mapping[str, Shape]) -> tuple[RarConfig, CodeShape]:
    require(found, RANKS, "a RAR generator")
    width = found["cls_token"][2]
    codes = found["lm_head.weight"][0]
    tokens = found["pos_embed"][1] - SPARE_POSITIONS
    classes = found["embeddings.weight"][0] - codes - 2
    heads = width // found["blocks.0.attn.q_norm.weight"][0]
    side = math.isqrt(max(tokens, 0))
    if min(tokens, classes, heads) < 1 or width % heads or side * side != tokens:
        raise LayoutError("a RAR generator of a square grid of codes", rank_differences(found, RANKS))
    config = RarConfig(
        width=width,
        layers=len({name.split(".")[1] for name in found if name.startswith("blocks.")}),
        heads=heads,
        mlp_width=found["blocks.0.mlp.fc1.weight"][0],
    )
    return config, CodeShape(codes=codes, grid=(side, side), classes=classes)
