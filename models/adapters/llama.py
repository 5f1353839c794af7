"""Published generators of IBQ and of Open-MAGVIT2: Lightning checkpoints that also hold their tokenizer; strict.

Sizes are read from shapes. Two do not show there: the width of a head, which is 64 in all published files, and the
grid of codes, because rotary tables are not stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from models.adapters.layout import GeneratorWeights, LayoutError, Shape, compare, shapes
from models.adapters.tokenizers import PARTS, count, rank_differences, require
from models.generators.config import CodeShape, FactorizedConfig, LlamaConfig
from models.generators.llama.network import Llama

PREFIX = "transformer."
HEAD_WIDTH = 64
CLASSES = "class_emb.embedding_table.weight"  # the last row stands for a label that was dropped
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
Kind = Literal["llama", "factorized"]
SUBJECTS: dict[Kind, str] = {"llama": "an IBQ generator", "factorized": "an Open-MAGVIT2 generator"}


def recognise(
    state: Mapping[str, Tensor],
    *,
    kind: Kind,
    grid: tuple[int, int] = (16, 16),
    heads: int | None = None,
) -> GeneratorWeights:
    """Read sizes from shapes, check every tensor of the generator, rename. The tokenizer in the file has its own adapter.

    grid: rows and columns of codes.  heads: their number, if they are not 64 wide. Raises LayoutError with all that
    is missing, surplus or misshapen.
    """
    state = {name: tensor for name, tensor in state.items() if not name.startswith(PARTS)}
    state = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if not COMPUTED.search(name)}
    found = shapes(state)
    read = _read_factorized if kind == "factorized" else _read_llama
    config, codes, factors = read(found, SUBJECTS[kind], heads)
    shape = CodeShape(codes=codes, grid=grid, classes=found[CLASSES][0] - 1, factors=factors)
    with torch.device("meta"):
        wanted = shapes(Llama(config, shape).state_dict())
    names = {name: published_name(name, PUBLISHED[kind]) for name in wanted}
    differences = compare(found, {names[name]: shape for name, shape in wanted.items()})
    if differences:
        raise LayoutError(SUBJECTS[kind], differences)
    return GeneratorWeights(config, shape, {name: state[names[name]] for name in wanted}, _size(config))


def _read_llama(
    found: Mapping[str, Shape], subject: str, heads: int | None
) -> tuple[LlamaConfig, int, tuple[int, ...]]:
    require(found, {"tok_emb.weight": 2, CLASSES: 2}, subject)
    numbers = _read_numbers(found, subject, heads, blocks="blocks.")
    closest = [size for size in LlamaConfig.sizes.values() if size["width"] == numbers["width"]]
    numbers |= {"gate_scale": closest[0]["gate_scale"]} if closest else {}
    return LlamaConfig(**numbers), found["tok_emb.weight"][0], ()


def _read_factorized(
    found: Mapping[str, Shape], subject: str, heads: int | None
) -> tuple[FactorizedConfig, int, tuple[int, ...]]:
    require(found, {"pre_emb.weight": 2, "post_emb.weight": 2, CLASSES: 2}, subject)
    low, high = found["pre_emb.weight"][0], found["post_emb.weight"][0]
    numbers = _read_numbers(found, subject, heads, blocks="spatial_blocks.")
    layers = count(found, "factorized_blocks.")
    if min(layers, low - 1, high - 1) < 1:
        ranks = {"pre_emb.weight": 2, "post_emb.weight": 2, "factorized_blocks.0.attention.wqkv.weight": 2}
        raise LayoutError(subject, rank_differences(found, ranks))
    config = FactorizedConfig(**numbers, head_layers=layers, factors=(low, high))
    return config, low * high, config.factors


def _read_numbers(found: Mapping[str, Shape], subject: str, heads: int | None, *, blocks: str) -> dict[str, Any]:
    """Width, blocks and heads. LayoutError without a first block or a class."""
    rows, width = found[CLASSES]
    layers = count(found, blocks)
    if layers < 1 or rows < 2 or width % (HEAD_WIDTH if heads is None else 4 * heads):
        raise LayoutError(subject, rank_differences(found, {CLASSES: 2, f"{blocks}0.attention.wqkv.weight": 2}))
    return {"width": width, "layers": layers, "heads": heads or width // HEAD_WIDTH}


def published_name(name: str, names: Mapping[str, str]) -> str:
    for ours, published in names.items():
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    return name


def _size(config: LlamaConfig | FactorizedConfig) -> str | None:
    fields = config.model_dump()
    sizes = config.sizes.items()
    return next((name for name, size in sizes if all(fields[key] == value for key, value in size.items())), None)
