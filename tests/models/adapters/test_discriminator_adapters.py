"""Discriminators in published names: sizes are read off the shapes, whatever the kind."""

from __future__ import annotations

import pytest
import torch

from models.adapters.discriminators import recognise
from models.adapters.layout import LayoutError
from models.losses.config import DISCRIMINATORS, BlurConfig, DiscriminatorConfig, PatchConfig
from models.registry import build


@pytest.mark.parametrize(
    "config",
    [
        PatchConfig(width=8, layers=1),
        PatchConfig(width=4, layers=4),
        BlurConfig(width=32, stages=2),
        BlurConfig(width=64, stages=1, resample="average"),
    ],
)
def test_sizes_are_read_off_the_shapes(config: DiscriminatorConfig) -> None:
    own = build(config, DISCRIMINATORS, channels=2).state_dict()
    state = {f"loss.discriminator.{name}": tensor for name, tensor in own.items()}
    found = recognise(state | {"encoder.conv_in.weight": torch.zeros(1)})
    assert (found.config, found.channels) == (config, 2)
    assert found.state.keys() == own.keys()


def test_an_impossible_width_is_refused() -> None:
    state = {"loss.discriminator.block_in.0.weight": torch.zeros(20, 3, 5, 5)}
    with pytest.raises(LayoutError, match=r"loss\.discriminator\.block_in\.0\.weight"):
        recognise(state)
