"""Base of all configs: frozen, strict, and free of torch, so that planning never imports a network."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic.config import JsonDict

NEUTRAL: JsonDict = {"neutral": True}
"""`Field(default, json_schema_extra=NEUTRAL)`: a field that was added later and whose default does not change artifact keys."""


class Config(BaseModel):
    """A frozen config that refuses unknown keys and conversions (1.5 is not a valid int, "8" is not a valid number)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())
