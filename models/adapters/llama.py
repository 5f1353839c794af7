"""Published generators of IBQ and of Open-MAGVIT2: Lightning checkpoints that also hold their tokenizer; strict.

Sizes are read off the shapes. Two are not in them: the width of a head is 64 in all published files, and the number of
positions is left to who knows the tokenizer, because rotary tables are not stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.adapters.layout import LayoutError, Shape, compare, shapes
from models.adapters.tokenizers import PARTS, count, require, untold
from models.generators.config import CodeShape, FactorizedConfig, LlamaConfig
from models.generators.llama.network import Llama

PREFIX = "transformer."
HEAD_WIDTH = 64
COMPUTED = re.compile(r"freqs_cis$|\.kv_cache\.")  # tables, and caches that a file has if it was saved after sampling
PUBLISHED = {  # ours: published; longer ones first
    "llama": {
        "embeddings.0.": "tok_emb.",
        "class_embedding.": "class_emb.embedding_table.",
        "head.norm.": "head_nm.rmsnorm.",
        "head.ada_lin.": "head_nm.ada_lin.",
        "head.linears.0.": "head.",
    },
    "factorized": {
        "embeddings.0.": "pre_emb.",
        "embeddings.1.": "post_emb.",
        "class_embedding.": "class_emb.embedding_table.",
        "head.blocks.": "factorized_blocks.",
        "head.norm.": "norm.",
        "head.linears.": "head.",
        "blocks.": "spatial_blocks.",
    },
}


@dataclass(frozen=True)
class LlamaWeights:
    """What a state dict turned out to be: `Llama(config, CodeShape(codes=..., grid=..., classes=...))` takes `state` as it is.

    size: the published size ("b", ...) that it has, or None.
    """

    config: LlamaConfig | FactorizedConfig
    codes: int
    classes: int
    size: str | None
    state: dict[str, Tensor]


def recognise(state: Mapping[str, Tensor], *, heads: int | None = None) -> LlamaWeights:
    """Read sizes off the shapes, check every tensor of the generator, rename. The tokenizer's are for its own adapter.

    heads: how many there are, if they are not 64 wide. Raises LayoutError with all that is missing, surplus or misshapen.
    """
    state = {name: tensor for name, tensor in state.items() if not name.startswith(PARTS)}
    state = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if not COMPUTED.search(name)}
    found = shapes(state)
    kind = "factorized" if "pre_emb.weight" in found else "llama"
    subject = {"llama": "an IBQ generator", "factorized": "an Open-MAGVIT2 generator"}[kind]
    config, codes, classes = (_read_factorized if kind == "factorized" else _read_llama)(found, subject, heads)
    with torch.device("meta"):
        wanted = shapes(Llama(config, CodeShape(codes=codes, grid=(1, 1), classes=classes)).state_dict())
    names = {name: published_name(name, PUBLISHED[kind]) for name in wanted}
    differences = compare(found, {names[name]: shape for name, shape in wanted.items()})
    if differences:
        raise LayoutError(subject, differences)
    return LlamaWeights(config, codes, classes, _size(config), {name: state[names[name]] for name in wanted})


def _read_llama(found: Mapping[str, Shape], subject: str, heads: int | None) -> tuple[LlamaConfig, int, int]:
    telling = {"tok_emb.weight": 2, "class_emb.embedding_table.weight": 2}
    require(found, telling, subject)
    codes, width = found["tok_emb.weight"]
    numbers = _read_numbers(found, telling, subject, width, heads, blocks="blocks.")
    closest = [size for size in LlamaConfig.sizes.values() if size["width"] == width]
    gates = {"gate_scale": closest[0]["gate_scale"]} if closest else {}
    return LlamaConfig(**numbers, **gates), codes, found["class_emb.embedding_table.weight"][0] - 1


def _read_factorized(found: Mapping[str, Shape], subject: str, heads: int | None) -> tuple[FactorizedConfig, int, int]:
    telling = {"pre_emb.weight": 2, "post_emb.weight": 2, "class_emb.embedding_table.weight": 2}
    require(found, telling, subject)
    (low, width), (high, _) = found["pre_emb.weight"], found["post_emb.weight"]
    numbers = _read_numbers(found, telling, subject, width, heads, blocks="spatial_blocks.")
    layers = count(found, "factorized_blocks.")
    if min(layers, low - 1, high - 1) < 1:
        raise LayoutError(subject, untold(found, telling | {"factorized_blocks.0.attention.wqkv.weight": 2}))
    config = FactorizedConfig(**numbers, head_layers=layers, factors=(low, high))
    return config, low * high, found["class_emb.embedding_table.weight"][0] - 1


def _read_numbers(
    found: Mapping[str, Shape], telling: Mapping[str, int], subject: str, width: int, heads: int | None, *, blocks: str
) -> dict[str, Any]:
    """Width, blocks and heads; the first block and at least one class must be there."""
    heads, layers = heads or width // HEAD_WIDTH, count(found, blocks)
    if min(heads, layers, found["class_emb.embedding_table.weight"][0] - 1) < 1 or width % (4 * heads):
        raise LayoutError(subject, untold(found, {**telling, f"{blocks}0.attention.wqkv.weight": 2}))
    return {"width": width, "layers": layers, "heads": heads}


def published_name(name: str, names: Mapping[str, str]) -> str:
    for ours, published in names.items():
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    return name


def _size(config: LlamaConfig | FactorizedConfig) -> str | None:
    fields = config.model_dump()
    sizes = config.sizes.items()
    return next((name for name, size in sizes if all(fields[key] == value for key, value in size.items())), None)
