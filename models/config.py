"""Base of all configs: frozen, strict, and free of torch, so that planning never imports a network."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic.config import JsonDict

NEUTRAL: JsonDict = {"neutral": True}
"""`Field(default, json_schema_extra=NEUTRAL)`: a later field whose default leaves the keys of older configs alone."""


class Config(BaseModel):
    """A frozen config that refuses unknown keys and silent conversions (1.5 is no int, "8" is no number)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())
