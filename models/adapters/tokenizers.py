"""What the adapters of published files share: sizes read from shapes, averaged weights, strict renaming."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.adapters.layout import ANY, Difference, LayoutError, Shape, compare, shapes
from models.tokenizer import Tokenizer
from models.tokenizer_config import TokenizerConfig

AVERAGE = "model_ema."
CODEBOOK = "quantize.embedding.weight"
PARTS = ("first_stage_model.", "vqgan.")  # where checkpoints of generators keep the tokenizer that they were trained on
COUNTERS = ("quantizer.step", "quantizer.usage_K")  # ours; no published file has them


@dataclass(frozen=True)
class TokenizerWeights:
    """A recognised state dict: `Tokenizer(config).load_state_dict(state)` takes `state` unchanged."""

    config: TokenizerConfig
    state: dict[str, Tensor]


def has_averages(state: Mapping[str, Tensor]) -> bool:
    """Whether the file holds averaged weights beside the raw ones."""
    return any(name.startswith(AVERAGE) for name in state)


def network_weights(state: Mapping[str, Tensor], *, averaged: bool) -> dict[str, Tensor]:
    """The tensors of the tokenizer alone, under their plain names, from a training checkpoint or a generator's.

    Losses (discriminator, perceptual network) are left out. The average of a tensor has its name without the dots;
    averages of no tensor stay in, for the caller to refuse. Raises LayoutError if averages are wanted but missing.
    """
    state = tokenizer_part(state)
    raw = {name: tensor for name, tensor in state.items() if not name.startswith(("loss.", AVERAGE))}
    twins = {name: AVERAGE + name.replace(".", "") for name in state if not name.startswith(AVERAGE)}
    constants = {AVERAGE + "decay", AVERAGE + "num_updates"}
    orphans = {
        name: tensor
        for name, tensor in state.items()
        if name.startswith(AVERAGE) and name not in constants and name not in twins.values()
    }
    if not averaged:
        return raw | orphans
    missing = [
        Difference(twins[name], None, tuple(tensor.shape)) for name, tensor in raw.items() if twins[name] not in state
    ]
    if missing:
        raise LayoutError("a checkpoint with averaged weights", missing)
    return {name: state[twins[name]] for name in raw} | orphans


def tokenizer_part(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tokenizer within a generator's checkpoint, or all of it."""
    for prefix in PARTS:
        part = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if part:
            return part
    return state


def read_levels(found: Mapping[str, Shape], subject: str) -> dict[str, Any]:
    """Channels, width, multipliers and blocks of a `LevelledConfig`, from the shapes of the encoder."""
    levels = count(found, "encoder.down.")
    ranks = {"encoder.conv_in.weight": 4}
    ranks |= {f"encoder.down.{level}.block.0.conv2.weight": 4 for level in range(max(levels, 1))}
    require(found, ranks, subject)
    width, channels = found["encoder.conv_in.weight"][:2]
    widths = [found[f"encoder.down.{level}.block.0.conv2.weight"][0] for level in range(levels)]
    if width % 32 or any(level_width % width for level_width in widths):
        raise LayoutError(subject, rank_differences(found, ranks))
    return {
        "channels": channels,
        "width": width,
        "multipliers": tuple(level_width // width for level_width in widths),
        "blocks": count(found, "encoder.down.0.block."),
    }


def count(found: Mapping[str, Shape], prefix: str) -> int:
    """The number of numbered children of `prefix`."""
    return len({name.removeprefix(prefix).split(".")[0] for name in found if name.startswith(prefix)})


def require(found: Mapping[str, Shape], ranks: Mapping[str, int], subject: str) -> None:
    """LayoutError unless the tensors that sizes are read from are there, not empty, and of these ranks."""
    if any(len(found.get(name, ())) != rank or 0 in found[name] for name, rank in ranks.items()):
        raise LayoutError(subject, rank_differences(found, ranks))


def rank_differences(found: Mapping[str, Shape], ranks: Mapping[str, int]) -> list[Difference]:
    return [Difference(name, found.get(name), (ANY,) * rank) for name, rank in ranks.items()]


def adapt(
    state: Mapping[str, Tensor], config: TokenizerConfig, *, subject: str, published: Callable[[str], str]
) -> TokenizerWeights:
    """Check every tensor and rename it; `published` maps our name of an autoencoder's tensor to the published one.

    Raises LayoutError with all that is missing, surplus or misshapen, in published names.
    """
    with torch.device("meta"):
        ours = shapes(Tokenizer(config).state_dict())
    names = {name: published_name(name, published) for name in ours if name not in COUNTERS}
    differences = compare(shapes(state), {names[name]: ours[name] for name in names})
    if differences:
        raise LayoutError(subject, differences)
    codes = config.codebook_size
    counters = dict(zip(COUNTERS, (torch.zeros((), dtype=torch.int64), torch.full((codes,), 1 / codes)), strict=True))
    return TokenizerWeights(config, {name: state[names[name]] for name in names} | counters)


def published_name(name: str, published: Callable[[str], str]) -> str:
    return CODEBOOK if name == "quantizer.codebook_KD" else published(name.removeprefix("autoencoder."))


def discriminator_weights(state: Mapping[str, Tensor], *, averaged: bool) -> dict[str, Tensor]:
    """The discriminator of a training checkpoint, in its plain names; empty if the file has none.

    Running statistics of its normalisation have no average.
    """
    prefix = "loss.discriminator."
    found = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    if averaged:
        found = {name: state.get(AVERAGE + name.replace(".", ""), tensor) for name, tensor in found.items()}
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}
