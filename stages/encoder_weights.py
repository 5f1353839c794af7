"""Published encoder weights: from a local file, or from the hub by name, revision and digest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from models.encoders.config import Dinov2Config
from pipeline.config import Config
from pipeline.durable import hash_file
from pipeline.errors import CorruptError, InputError
from pipeline.runtime import Runtime

if TYPE_CHECKING:
    import torch


class HubWeights(Config):
    """A weight file on the Hugging Face hub. Without a digest and a fixed revision it may change under its name."""

    repository: str = Field(description="such as timm/vit_base_patch14_reg4_dinov2.lvd142m")
    file: str = Field(default="model.safetensors", description="file in the repository")
    revision: str = Field(default="main", description="branch, tag or commit")
    sha256: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="digest that the file must have; null: any"
    )


def published_weights(config: Dinov2Config, hub: HubWeights | None, run: Runtime) -> dict[str, torch.Tensor]:
    """A dinov2's weights as its network wants them; CorruptError if the file holds another network."""
    from models.adapters.dinov2 import to_timm
    from models.encoders.config import BUILDERS
    from models.registry import build

    path = run.paths.get("weights") or download(hub or default_place(config), run)
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


def download(place: HubWeights, run: Runtime) -> Path:
    """The file in the hub's local cache, fetched if it is not there. The hub's own bar shows the progress."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    run.progress.say(f"  weights: {place.repository} at {place.revision}")
    try:
        path = Path(hf_hub_download(place.repository, place.file, revision=place.revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"the weights {place.file} of {place.repository} are not in the local cache and cannot be downloaded "
            f"({type(error).__name__})",
            path=place.repository,
            hint=f"fetch https://huggingface.co/{place.repository}/resolve/{place.revision}/{place.file} "
            "on a machine with network and give the file with --weights",
        ) from error
    check_digest(path, place)
    return path


def check_digest(path: Path, place: HubWeights) -> None:
    found = hash_file(path)
    if place.sha256 is not None and found != place.sha256:
        raise CorruptError(
            f"{place.file} of {place.repository} has SHA-256 {found[:12]}..., expected {place.sha256[:12]}...",
            path=path,
            hint="delete it from the hub's cache and run again, or correct hub.sha256",
        )


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
