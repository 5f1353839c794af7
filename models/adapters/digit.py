"""Published DiGIT checkpoints (fairseq's names): generators; strict.

The state dict of a file holds `decoder.*` (the generator), and, of the parts that training kept frozen, `pretrained_encoder.*`,
`centroids` and `centroid_norm` (the codebook, transposed), `vqgan.*`. Sizes of a generator are read from shapes, its number of heads
from the file's settings, `cfg["model"]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from models.adapters.layout import GeneratorWeights, LayoutError, Shape, compare, shapes
from models.adapters.tokenizers import require
from models.generators.config import GPT_SIZES, SPECIALS, UNREAD_POSITIONS, CodeShape, GptConfig
from models.generators.gpt.network import Gpt

SUBJECT = "a DiGIT generator"
PREFIX = "decoder."
VERSION = "version"  # a number beside the tensors
TABLE, PREFIX_POSITIONS, LOGITS = "embed_tokens.weight", "embed_positions_1.weight", "output_projection.weight"
RANKS = {TABLE: 2, LOGITS: 2, "embed_positions.weight": 2, "layers.0.fc1.weight": 2}  # ranks
SETTINGS: dict[str, Any] = {
    "activation_fn": "gelu",
    "decoder_learned_pos": True,
    "no_scale_embedding": False,
    "layernorm_embedding": False,
    "share_decoder_input_output_embed": False,
}
"""The only values that the network supports, of settings that shapes do not show."""

OUTER = {
    "embeddings": "embed_tokens",
    "positions": "embed_positions",
    "condition_positions": "embed_positions_1",
    "norm": "layer_norm",
    "head": "output_projection",
}
IN_BLOCKS = {
    "norm1": "self_attn_layer_norm",
    "norm2": "final_layer_norm",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}
"""Our names of modules and the published ones; published files have q, k and v apart, we join them."""


def recognise(
    published: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    *,
    grid: tuple[int, int] = (16, 16),
    sampling: Literal["steps", "masks"] = "steps",
) -> GeneratorWeights:
    """Read sizes from shapes, check every tensor of the generator, and rename; other parts of the file are ignored.

    settings: the file's `cfg["model"]`.  grid: of the codes and of those of a condition, which position tables, being longer, do
    not show.  sampling: published pixel decoders of both kinds have the same names and shapes.  Raises LayoutError with all
    that is missing, surplus or misshapen, and ValueError for settings of another network.
    """
    state = {name.removeprefix(PREFIX): tensor for name, tensor in published.items() if name.startswith(PREFIX)}
    state.pop(VERSION, None)
    found = shapes(state)
    require(found, RANKS, SUBJECT)
    config, shape = _read_sizes(found, settings, grid, sampling)
    with torch.device("meta"):
        ours = shapes(Gpt(config, shape).state_dict())
    differences = compare(found, _published_shapes(ours))
    if differences:
        raise LayoutError(f"{SUBJECT} {config.layers} layers deep and {config.width} wide", differences)
    numbers = config.model_dump()
    size = next((name for name, given in GPT_SIZES.items() if all(numbers[k] == v for k, v in given.items())), None)
    return GeneratorWeights(config=config, shape=shape, state=_to_ours(state, ours, shape.codes), size=size)


def _read_sizes(
    found: Mapping[str, Shape], settings: Mapping[str, Any], grid: tuple[int, int], sampling: Literal["steps", "masks"]
) -> tuple[GptConfig, CodeShape]:
    norm: Literal["pre", "post"] = "pre" if "layer_norm.weight" in found else "post"
    heads = _check_settings(settings, norm)
    codes = found[LOGITS][0] - SPECIALS
    beyond = found[TABLE][0] - SPECIALS - codes
    condition: Literal["none", "class", "codes"] = (
        "codes" if PREFIX_POSITIONS in found else "class" if beyond else "none"
    )
    config = GptConfig(
        width=found[TABLE][1],
        layers=len({name.split(".")[1] for name in found if name.startswith("layers.")}),
        heads=heads,
        mlp_width=found["layers.0.fc1.weight"][0],
        norm=norm,
        condition=condition,
        sampling=sampling,
        positions=found["embed_positions.weight"][0] - UNREAD_POSITIONS,
        dropout=settings.get("dropout", 0.1),
    )
    given = CodeShape(codes=beyond - SPECIALS, grid=grid) if condition == "codes" else None
    classes = beyond if condition == "class" else 0
    return config, CodeShape(codes=codes, grid=grid, classes=classes, condition=given)


def _check_settings(settings: Mapping[str, Any], norm: Literal["pre", "post"]) -> int:
    """The number of heads. ValueError for settings that are missing, or of another network."""
    wanted = SETTINGS | {"decoder_normalize_before": norm == "pre"}
    others = [f"{name} is {settings[name]!r}" for name in wanted if settings.get(name, wanted[name]) != wanted[name]]
    if others:
        raise ValueError(f"the settings in the file are not those of {SUBJECT}: {', '.join(others)}")
    heads = settings.get("decoder_attention_heads")
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise ValueError(f"decoder_attention_heads in the file's settings must be a positive integer, but is {heads!r}")
    return heads


def _published_shapes(ours: Mapping[str, Shape]) -> dict[str, Shape]:
    wanted: dict[str, Shape] = {}
    for name, (rows, *rest) in ours.items():
        names = _published_names(name)
        wanted |= {published: (rows // len(names), *rest) for published in names}
    return wanted


def _to_ours(state: Mapping[str, Tensor], ours: Iterable[str], codes: int) -> dict[str, Tensor]:
    joined = {name: torch.cat([state[published] for published in _published_names(name)]) for name in ours}
    return joined | {name: _specials_last(joined[name], codes) for name in ("embeddings.weight", "head.weight")}


def _published_names(name: str) -> tuple[str, ...]:
    """The published tensors whose concatenation is ours."""
    module, kind = name.rsplit(".", 1)
    if not module.startswith("blocks."):
        return (f"{OUTER[module]}.{kind}",)
    _, index, part = module.split(".", 2)
    if part == "attn.qkv":
        return tuple(f"layers.{index}.self_attn.{one}_proj.{kind}" for one in "qkv")
    return (f"layers.{index}.{IN_BLOCKS[part]}.{kind}",)


def _specials_last(table_VD: Tensor, codes: int) -> Tensor:
    """Published ids begin with specials, then codes; ours with codes, then specials. Later ids stay."""
    return torch.cat([table_VD[SPECIALS : SPECIALS + codes], table_VD[:SPECIALS], table_VD[SPECIALS + codes :]])
