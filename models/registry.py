"""From a config to its network: `kind` names a builder, and only then is its module (and torch) imported."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from models.config import Config


def build(config: Config, builders: dict[str, str], **parts: Any) -> Any:
    """Build what `config.kind` names: `builders` maps a kind to "module:Class", which is called with (config, **parts)."""
    module, name = builders[config.kind].split(":")  # type: ignore[attr-defined]  # every union member has a kind
    return getattr(import_module(module), name)(config, **parts)
