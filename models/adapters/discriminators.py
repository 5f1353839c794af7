"""Discriminators in training checkpoints of IBQ and Open-MAGVIT2: under `loss.discriminator.`, with averages or without; strict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.adapters.layout import ANY, Difference, LayoutError, compare, shapes
from models.adapters.tokenizers import AVERAGE, count, discriminator_weights, has_averages, require
from models.losses.config import DISCRIMINATORS, BlurConfig, DiscriminatorConfig, PatchConfig
from models.registry import build

__all__ = ["has_averages", "recognise"]

SUBJECT = "a discriminator"
PREFIX = "loss.discriminator."
PATCH, BLUR = "main.0.weight", "block_in.0.weight"


@dataclass(frozen=True)
class DiscriminatorWeights:
    """A recognised state dict: `build(config, DISCRIMINATORS, channels=channels)` takes the state unchanged."""

    config: DiscriminatorConfig
    channels: int
    state: dict[str, Tensor]


def recognise(state: Mapping[str, Tensor], *, averaged: bool = True) -> DiscriminatorWeights:
    """Read sizes from shapes and check every tensor; other parts of the file are ignored.

    Raises LayoutError with all that is missing, surplus or misshapen, in published names.
    """
    averaged = averaged and has_averages(state)
    found = discriminator_weights(state, averaged=averaged)
    is_blur = BLUR in found
    first = BLUR if is_blur else PATCH
    require({PREFIX + name: tuple(one.shape) for name, one in found.items()}, {PREFIX + first: 4}, SUBJECT)
    width, channels = found[first].shape[:2]
    config = read_blur(found, width) if is_blur else read_patch(found, width)
    with torch.device("meta"):
        network = build(config, DISCRIMINATORS, channels=channels)
    differences = [
        Difference(PREFIX + one.name, one.found, one.wanted)
        for one in compare(shapes(found), shapes(network.state_dict()))
    ]
    twins = {AVERAGE + (PREFIX + name).replace(".", ""): one for name, one in network.named_parameters()}
    if averaged:
        differences += [Difference(name, None, tuple(one.shape)) for name, one in twins.items() if name not in state]
    if differences:
        raise LayoutError(SUBJECT, differences)
    return DiscriminatorWeights(config, channels, found)


def read_patch(found: Mapping[str, Tensor], width: int) -> PatchConfig:
    """The last layer is number 3 * layers + 2: a norm and an activation follow each layer, only an activation the first."""
    numbers = [int(name.split(".")[1]) for name in found if name.split(".")[1:2] and name.split(".")[1].isdigit()]
    return PatchConfig(width=width, layers=max(1, (max(numbers) - 2) // 3))


def read_blur(found: Mapping[str, Tensor], width: int) -> BlurConfig:
    if width % 32:
        raise LayoutError(SUBJECT, [Difference(PREFIX + BLUR, tuple(found[BLUR].shape), (ANY,) * 4)])
    resample = "blur" if "blocks.0.1.kernel" in found else "average"
    return BlurConfig(width=width, stages=max(1, count(shapes(found), "blocks.")), resample=resample)
