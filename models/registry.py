"""From a config to its network: `kind` names a builder, whose module (and torch) is imported on demand."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from models.config import Config


def load(place: str) -> Any:
    """Import "module:name"."""
    module, name = place.split(":")
    return getattr(import_module(module), name)


def build(config: Config, builders: dict[str, str], **parts: Any) -> Any:
    """Build what `config.kind` names in `builders`, by calling its class with (config, **parts)."""
    return load(builders[config.kind])(config, **parts)  # type: ignore[attr-defined]  # every union member has a kind
