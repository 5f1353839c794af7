"""DiGIT's published numbers, and networks of their weights."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from models.adapters.digit import recognise
from models.generators.config import SPECIALS
from models.generators.generator import build_generator
from models.generators.gpt.network import Gpt

GOLDEN = Path(__file__).parents[2] / "golden" / "digit"


@cache
def arrays(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


@cache
def about(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    return found


def tolerance(name: str) -> float:
    return float(about(name)["tolerance"]["decoder_logits_max_abs_cpu"])


def published_weights(name: str) -> dict[str, Tensor]:
    """As the checkpoint has them, in float32."""
    return {key[8:]: tensor.float() for key, tensor in arrays(name).items() if key.startswith("weights/")}


def network(name: str) -> Gpt:
    sampling = "masks" if name == "stage2_nar" else "steps"
    found = recognise(published_weights(name), about(name)["config"], sampling=sampling)
    model = build_generator(found.config, found.shape)
    assert isinstance(model, Gpt)
    model.load_state_dict(found.state, strict=True)
    return model.eval()


def codes_of(ids: Tensor) -> Tensor:
    """Published ids as raw codes."""
    return ids.long() - SPECIALS


def as_published(logits_BTV: Tensor) -> Tensor:
    """Specials before the codes."""
    return logits_BTV.roll(SPECIALS, dims=-1)
