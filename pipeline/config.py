"""Base of the pipeline's configs: frozen, strict, unknown keys refused with the nearest known name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import UsageError


class Config(BaseModel):
    """A frozen config that refuses unknown keys and silent conversions (1.5 is no int, "8" is no number)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


ModelT = TypeVar("ModelT", bound=BaseModel)


def parse_config(model: type[ModelT], values: Mapping[str, Any], *, where: str) -> ModelT:
    """Validate plain JSON values, laid over the model's defaults (see `merge`).

    UsageError (exit code 2) names the place, what was found and what is expected.
    """
    try:
        text = json.dumps(merge(defaults(model, values), values), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where} holds a value that is no plain number, text, list or mapping: {error}") from error
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise UsageError(explain(error, model, where)) from error


def defaults(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a config as plain JSON values; required fields are left out.

    A part that is null unless asked for has its own defaults as soon as `values` ask for it by some settings.
    """
    fields = {name: field for name, field in model.model_fields.items() if not field.is_required()}
    found = {name: _plain(field.get_default(call_default_factory=True)) for name, field in fields.items()}
    for name, field in fields.items():
        asked, part = values.get(name), _optional_part(field.annotation)
        if found[name] is None and part is not None and isinstance(asked, Mapping):
            found[name] = defaults(part, asked)
    return found


def merge(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` over `base`, mapping by mapping: one changed setting leaves its neighbours alone.

    A mapping that names its `kind` stands for itself: another kind has other settings.
    """
    merged = dict(base)
    for name, value in values.items():
        under = merged.get(name)
        is_change = isinstance(value, Mapping) and "kind" not in value and isinstance(under, Mapping)
        merged[name] = merge(under, value) if is_change else value  # type: ignore[arg-type]  # both are mappings then
    return merged


def explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """The first complaint of pydantic as one sentence of ours."""
    complaint = error.errors(include_url=False)[0]
    place = ".".join([where, *(str(part) for part in complaint["loc"])])
    if complaint["type"] == "extra_forbidden":
        return unknown_key(str(complaint["loc"][-1]), place.rpartition(".")[0], known_fields(model))
    if complaint["type"] == "missing":
        return f"{place} is missing"
    found = complaint.get("input")
    message = complaint["msg"].removeprefix("Value error, ")
    of_one_value = "" if isinstance(found, Mapping) else f" (found {json.dumps(found, default=str)[:80]})"
    return f"{place}: {message[0].lower()}{message[1:]}{of_one_value}"


def unknown_key(key: str, where: str, known: list[str]) -> str:
    """The sentence for an unknown key, with the nearest known one."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    advice = f"did you mean {nearest[0]!r}?" if nearest else f"known are: {', '.join(sorted(known)[:20])}"
    return f"unknown key {key!r} in {where}: {advice}"


def known_fields(model: type[BaseModel]) -> list[str]:
    """Every field name of this config and of the configs in it."""
    schema = model.model_json_schema()
    parts = [schema, *schema.get("$defs", {}).values()]
    return sorted({name for part in parts for name in part.get("properties", {})})


def _optional_part(annotation: Any) -> type[BaseModel] | None:
    """The config that an annotation `config | None` names, if it is one."""
    named = [kind for kind in get_args(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return named[0] if len(named) == 1 else None


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value
