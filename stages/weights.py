"""Networks in artifacts: `config.json` says what to build, `weights.safetensors` holds the tensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from pipeline.artifact import Artifact
from pipeline.draft import Draft
from pipeline.errors import CorruptError
from pipeline.keys import canonical_bytes, config_value

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors words what the system answered


def save_weights(out: Draft, state: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Write a network's tensors and its config as the two units "weights" and "config"."""
    with out.writing("weights", WEIGHTS) as path:
        write_tensors(path, {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    out.put("config", {CONFIG: canonical_bytes(config) + b"\n"})


def write_tensors(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write contiguous CPU tensors as safetensors; OSError, as any other writer raises it, if the system refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(state), path)
    except SafetensorError as error:
        answer = OS_ERROR.search(str(error))
        if answer is None:
            raise
        number = int(answer[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def load_weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    """Tensors of an artifact; they were checked by SHA-256 before the stage began."""
    from safetensors.torch import load_file

    return load_file(artifact.file(WEIGHTS))


def load_config(artifact: Artifact) -> dict[str, Any]:
    return dict(json.loads(artifact.file(CONFIG).read_bytes()))


def fill(network: torch.nn.Module, state: dict[str, torch.Tensor], artifact: Artifact) -> None:
    """Load strictly; CorruptError (exit code 4) lists what is missing, surplus or of another shape."""
    own = network.state_dict()
    missing = sorted(own.keys() - state.keys())
    surplus = sorted(state.keys() - own.keys())
    shapes = [
        f"{name}: expected {tuple(own[name].shape)}, found {tuple(state[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    if missing or surplus or shapes:
        rows = [f"missing {name}" for name in missing] + [f"surplus {name}" for name in surplus] + shapes
        raise CorruptError(
            f"the weights of {artifact.name} do not fit its config ({len(rows)} differences):\n  "
            + "\n  ".join(rows[:20]),
            path=artifact.path,
        )
    network.load_state_dict(state)


def config_json(config: BaseModel) -> dict[str, Any]:
    return config_value(config)
