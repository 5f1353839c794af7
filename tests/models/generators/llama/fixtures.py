"""Both kinds of Llama-style generators with the weights of the published implementation's fixtures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from models.adapters.llama import PUBLISHED, Kind, published_name, recognise
from models.generators.config import FactorizedConfig, LlamaConfig
from models.generators.llama.network import Llama

GOLDEN = Path(__file__).parents[3] / "golden"
IBQ, MAGVIT2 = GOLDEN / "ibq" / "ar", GOLDEN / "open_magvit2" / "ar_generator"


def read(fixture: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Its description and its tensors."""
    return json.loads(fixture.with_suffix(".json").read_text()), load_file(fixture.with_suffix(".safetensors"))


def published(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict, in the precision in which it was used."""
    return {k.removeprefix("weights/"): v.float() for k, v in arrays.items() if k.startswith("weights/")}


def load(fixture: Path) -> Llama:
    """In evaluation mode. Heads have a width of 32 in IBQ's fixture and of 16 in Open-MAGVIT2's, not 64 as published."""
    state = published(read(fixture)[1])
    known: dict[Path, tuple[Kind, int]] = {IBQ: ("llama", 2), MAGVIT2: ("factorized", 4)}
    kind, heads = known[fixture]
    found = recognise(state, kind=kind, grid=(4, 4), heads=heads)
    assert isinstance(found.config, LlamaConfig | FactorizedConfig)
    network = Llama(found.config, found.shape)
    network.load_state_dict(found.state, strict=True)
    return network.eval()


def published_names(model: Llama) -> dict[str, str]:
    """Ours to published ones, without their prefix."""
    return {name: published_name(name, PUBLISHED[model.config.kind]) for name, _ in model.named_parameters()}
