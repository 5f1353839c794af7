"""From a config to its network: `kind` names a builder, and only then is its module (and torch) imported."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from models.config import Config


def load_class(config: Config, builders: dict[str, str]) -> Any:
    """The class that `config.kind` names: `builders` maps a kind to "module:Class"."""
    module, name = builders[config.kind].split(":")  # type: ignore[attr-defined]  # every union member has a kind
    return getattr(import_module(module), name)


def build(config: Config, builders: dict[str, str], **parts: Any) -> Any:
    """Build what `config.kind` names, by calling its class with (config, **parts)."""
    return load_class(config, builders)(config, **parts)
