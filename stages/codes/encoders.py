"""Encoders in artifacts: `encoder.json` is the config, `encoder.safetensors` holds fitted or published weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from models.encoders.config import BUILDERS, Dinov2Config, EncoderConfig, WhitenedPatchesConfig
from models.registry import build
from pipeline.artifact import Artifact
from pipeline.errors import CorruptError
from pipeline.stage_cache import cached
from stages.devices import pick_device
from stages.weights.checkpoint_reader import read_state
from stages.weights.places import HubWeights

if TYPE_CHECKING:
    import torch

ENCODER = "encoder.json"
ENCODER_WEIGHTS = "encoder.safetensors"
WITHIN = "pretrained_encoder."  # how its names begin in a checkpoint of DiGIT

Encoder = WhitenedPatchesConfig | Dinov2Config


def parse_encoder(values: Any, *, path: Path) -> Encoder:
    """An encoder's config from an artifact; CorruptError if it is not valid for this version."""
    try:
        found: Encoder = TypeAdapter(EncoderConfig).validate_json(json.dumps(values))
    except ValidationError as error:
        raise CorruptError(f"the encoder config in {path} does not fit this version", path=path) from error
    return found


def build_encoder(config: Encoder, state: dict[str, torch.Tensor], device: str) -> torch.nn.Module:
    """The network with its weights, ready to use."""
    encoder: torch.nn.Module = build(config, BUILDERS)
    encoder.load_state_dict(state)
    return encoder.eval().requires_grad_(False).to(pick_device(device))


@cached(2)
def load_encoder(folder: Path, digest: str, device: str) -> torch.nn.Module:
    """The encoder of a features artifact or its draft; once per process. digest: SHA-256 of its weight file."""
    from safetensors.torch import load_file

    config = parse_encoder(json.loads((folder / ENCODER).read_bytes()), path=folder)
    return build_encoder(config, load_file(folder / ENCODER_WEIGHTS), device)


def read_encoder(features: Artifact) -> tuple[Encoder, dict[str, torch.Tensor]]:
    """The encoder of a features artifact: its config and weights."""
    from safetensors.torch import load_file

    config = parse_encoder(json.loads(features.file(ENCODER).read_bytes()), path=features.path)
    return config, load_file(features.file(ENCODER_WEIGHTS))


def published_weights(config: Dinov2Config, path: Path) -> dict[str, torch.Tensor]:
    """The weights of a dinov2 in the names of its network; CorruptError if the file holds another network."""
    from models.adapters.dinov2 import to_timm

    encoder = build(config, BUILDERS)
    try:
        state = read_state(path)
        within = {name.removeprefix(WITHIN): one for name, one in state.items() if name.startswith(WITHIN)}
        encoder.load_weights(to_timm(within or state))
    except (RuntimeError, KeyError) as error:
        first = str(error).split("\n")[1].strip() if "\n" in str(error) else f"no tensor {error}"
        raise CorruptError(f"{path} holds no weights of {config.timm_name}: {first}", path=path) from error
    loaded: dict[str, torch.Tensor] = encoder.state_dict()
    return loaded


def default_place(config: Dinov2Config) -> HubWeights:
    return HubWeights(repository=f"timm/{config.timm_name}.lvd142m")
