"""Published RAR weights: bare state dicts in our own parameter names, whose size is read off their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.adapters.layout import ANY, Difference, LayoutError, Shape, compare, shapes
from models.generators.config import SIZES, SPARE_POSITIONS, RarConfig
from models.generators.rar.network import Rar

# Rank of each tensor that the sizes are read from.
TELLING = {
    "cls_token": 3,
    "pos_embed": 3,
    "embeddings.weight": 2,
    "lm_head.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
    "blocks.0.attn.q_norm.weight": 1,
}


@dataclass(frozen=True)
class RarWeights:
    """What a state dict turned out to be: `Rar(config, codes=..., tokens=..., classes=...)` takes it as it is.

    size: the published size ("b", ...) that it has, or None.
    """

    config: RarConfig
    codes: int
    tokens: int
    classes: int
    size: str | None


def recognise(state: Mapping[str, Tensor]) -> RarWeights:
    """Read sizes off the shapes and check every tensor. Raises LayoutError with all that is missing, surplus, misshapen."""
    found = shapes(state)
    weights = _read_sizes(found)
    with torch.device("meta"):
        network = Rar(weights.config, codes=weights.codes, tokens=weights.tokens, classes=weights.classes)
    differences = compare(found, shapes(network.state_dict()))
    if differences:
        raise LayoutError(
            f"a RAR generator {weights.config.layers} layers deep and {weights.config.width} wide", differences
        )
    return weights


def _read_sizes(found: Mapping[str, Shape]) -> RarWeights:
    if any(len(found.get(name, ())) != rank or 0 in found[name] for name, rank in TELLING.items()):
        raise LayoutError("a RAR generator", _untold(found))
    width = found["cls_token"][2]
    codes = found["lm_head.weight"][0]
    tokens = found["pos_embed"][1] - SPARE_POSITIONS
    classes = found["embeddings.weight"][0] - codes - 2
    heads = width // found["blocks.0.attn.q_norm.weight"][0]
    if min(tokens, classes, heads) < 1 or width % heads:
        raise LayoutError("a RAR generator", _untold(found))
    numbers = {
        "width": width,
        "layers": len({name.split(".")[1] for name in found if name.startswith("blocks.")}),
        "heads": heads,
        "mlp_width": found["blocks.0.mlp.fc1.weight"][0],
    }
    size = next((name for name, published in SIZES.items() if published == numbers), None)
    return RarWeights(config=RarConfig(**numbers), codes=codes, tokens=tokens, classes=classes, size=size)


def _untold(found: Mapping[str, Shape]) -> list[Difference]:
    """The tensors that sizes are read from, as they are, beside their ranks."""
    return [Difference(name, found.get(name), (ANY,) * rank) for name, rank in TELLING.items()]
