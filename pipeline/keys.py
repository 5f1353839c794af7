"""Keys: an artifact is named by the SHA-256 of what was asked for (docs/artifacts.md, section 1).

What goes in: stage name and version, the whole validated config with its defaults, the keys of the inputs, the content
ids of external inputs. What stays out: paths, host, time, device, threads, workers, checkpoint cadence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import rfc8785
from pydantic import BaseModel
from pydantic.config import JsonDict

from pipeline.errors import UsageError

NEUTRAL: JsonDict = {"neutral": True}
"""`Field(default, json_schema_extra=NEUTRAL)`: a later field whose default leaves the keys of older configs alone."""
UNKEYED: JsonDict = {"neutral": "always"}
"""The same for a field that never changes a byte, such as a budget of memory: no value of it goes into the key."""

InputKeys = Mapping[str, str | list[str]]


def canonical_bytes(value: Any) -> bytes:
    """`value` as canonical JSON (RFC 8785); what cannot be encoded exactly (NaN, integers over 2**53) is refused."""
    try:
        return rfc8785.dumps(value)
    except rfc8785.CanonicalizationError as error:
        raise UsageError(f"this value has no exact JSON form and so no key: {error}") from error


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def config_value(config: BaseModel) -> dict[str, Any]:
    """The config as plain JSON values, defaults filled in, neutral fields at their default and unkeyed ones left out."""
    fields = type(config).model_fields
    kept = {name: getattr(config, name) for name in fields if not _is_neutral(fields[name], getattr(config, name))}
    return {name: _plain(value) for name, value in kept.items()}


def artifact_key(
    stage: str, version: int, config: Mapping[str, Any], inputs: InputKeys, externals: Mapping[str, str]
) -> str:
    """Hex SHA-256 that names the artifact of this request; computable before anything ran."""
    request = {
        "stage": stage,
        "version": version,
        "config": dict(config),
        "inputs": dict(inputs),
        "externals": dict(externals),
    }
    return sha256(canonical_bytes(request))


def _is_neutral(field: Any, value: Any) -> bool:
    extra = field.json_schema_extra
    neutral = extra.get("neutral") if isinstance(extra, dict) else None
    return neutral == "always" or (bool(neutral) and value == field.default)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return config_value(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
