"""Published encoder weights: from a local file, or from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from models.encoders.config import Dinov2Config
from pipeline.errors import CorruptError, InputError
from pipeline.runtime import Runtime
from stages.hub import HubWeights, download

if TYPE_CHECKING:
    import torch


def published_weights(config: Dinov2Config, hub: HubWeights | None, run: Runtime) -> dict[str, torch.Tensor]:
    """A dinov2's weights as its network wants them; CorruptError if the file holds another network."""
    from models.adapters.dinov2 import to_timm
    from models.encoders.config import BUILDERS
    from models.registry import build

    path = run.paths.get("weights") or download(hub or default_place(config), run.progress)
    encoder = build(config, BUILDERS)
    try:
        encoder.load_weights(to_timm(read_weights(path)))
    except (RuntimeError, KeyError) as error:
        first = str(error).split("\n")[1].strip() if "\n" in str(error) else f"no tensor {error}"
        raise CorruptError(f"{path} holds no weights of {config.timm_name}: {first}", path=path) from error
    state: dict[str, torch.Tensor] = encoder.state_dict()
    return state


def default_place(config: Dinov2Config) -> HubWeights:
    return HubWeights(repository=f"timm/{config.timm_name}.lvd142m")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict of plain tensors from .safetensors, or from .pth without executing anything in it."""
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as weights: {str(error).splitlines()[0][:120]}",
            path=path,
            hint="give a .safetensors file, or a .pth file of plain tensors",
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path} is no mapping from names to tensors", path=path, hint="give the state dict alone")
    return state
