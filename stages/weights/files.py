"""Networks in artifacts: `config.json` says what to build, `weights.safetensors` holds the tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import Artifact
from pipeline.draft import Draft
from pipeline.durable import HashingFile
from pipeline.errors import CorruptError
from pipeline.keys import canonical_bytes, sha256

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
TYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
}
"""Names of torch -> names in files, which hold the tensors of the last type first."""


def save_weights(out: Draft, state: Mapping[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Write a network's tensors and its config as the two units "weights" and "config"."""
    with out.streaming("weights", WEIGHTS) as file:
        write_tensors(file, state)
    out.put("config", {CONFIG: config_bytes(config)})


def digests_of(state: Mapping[str, torch.Tensor], config: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of each file that `save_weights` would write."""
    with Path(os.devnull).open("wb") as nowhere:
        file = HashingFile(nowhere)
        write_tensors(file, state)
    return {CONFIG: sha256(config_bytes(config)), WEIGHTS: file.sha256}


def config_bytes(config: dict[str, Any]) -> bytes:
    return canonical_bytes(config) + b"\n"


def write_tensors(file: HashingFile, state: Mapping[str, torch.Tensor]) -> None:
    """Write tensors of any device in the format of safetensors, one after the other: the bytes of its own `save`."""
    import torch

    types = {getattr(torch, name): place for place, name in enumerate(TYPES)}
    names = sorted(state, key=lambda name: (-types[state[name].dtype], name))
    header, end = {}, 0
    for name in names:
        tensor = state[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        word = TYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": word, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        stored = state[name].detach().to("cpu").contiguous().flatten().view(torch.uint8)
        file.write(stored.numpy().data)


def load_weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    """Tensors of an artifact; they were checked by SHA-256 before the stage began."""
    from safetensors.torch import load_file

    return load_file(artifact.file(WEIGHTS))


def load_config(artifact: Artifact) -> dict[str, Any]:
    return dict(json.loads(artifact.file(CONFIG).read_bytes()))


def fill(network: torch.nn.Module, state: dict[str, torch.Tensor], artifact: Artifact) -> None:
    """Load strictly; CorruptError (exit code 4) lists what is missing, surplus or of another shape."""
    from models.adapters.layout import compare, how_many, shapes, table

    differences = compare(shapes(state), shapes(network.state_dict()))
    if differences:
        raise CorruptError(
            f"the weights of {artifact.name} do not fit its config: {how_many(differences)}\n{table(differences[:20])}",
            path=artifact.path,
        )
    network.load_state_dict(state)
