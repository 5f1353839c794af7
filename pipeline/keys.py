"""Keys: an artifact is named by the SHA-256 of its request (docs/artifacts.md, section 1).

A request holds stage name and version, the validated config with its defaults, the keys of the inputs and the content
ids of external data; no paths, host, time, device, threads, workers or checkpoint interval.
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
"""`Field(default, json_schema_extra=NEUTRAL)`: a field that was added later and whose default does not change keys."""
UNKEYED: JsonDict = {"neutral": "always"}
"""The same for a field that never changes a byte, such as a budget of memory: no value of it goes into the key."""

InputKeys = Mapping[str, str | list[str]]


def canonical_bytes(value: Any) -> bytes:
    """`value` as canonical JSON (RFC 8785); what cannot be encoded exactly (NaN, integers over 2**53) is refused."""
    try:
        return rfc8785.dumps(value)
    except rfc8785.CanonicalizationError as error:
        raise UsageError(
            f"a value of the config cannot be encoded exactly as JSON, so there is no key: {error}"
        ) from error


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
    """Hex SHA-256 of a request."""
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
