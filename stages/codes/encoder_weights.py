"""Published encoder weights, as the encoder's network wants them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from models.encoders.config import Dinov2Config
from pipeline.errors import CorruptError
from stages.weights.foreign import read_state
from stages.weights.places import HubWeights

if TYPE_CHECKING:
    import torch


def published_weights(config: Dinov2Config, path: Path) -> dict[str, torch.Tensor]:
    """A dinov2's weights as its network wants them; CorruptError if the file holds another network."""
    from models.adapters.dinov2 import to_timm
    from models.encoders.config import BUILDERS
    from models.registry import build

    encoder = build(config, BUILDERS)
    try:
        encoder.load_weights(to_timm(read_state(path)))
    except (RuntimeError, KeyError) as error:
        first = str(error).split("\n")[1].strip() if "\n" in str(error) else f"no tensor {error}"
        raise CorruptError(f"{path} holds no weights of {config.timm_name}: {first}", path=path) from error
    state: dict[str, torch.Tensor] = encoder.state_dict()
    return state


def default_place(config: Dinov2Config) -> HubWeights:
    return HubWeights(repository=f"timm/{config.timm_name}.lvd142m")
