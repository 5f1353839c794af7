"""Base of the pipeline's configs: frozen, strict, unknown keys refused with the nearest known name."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import UsageError


class Config(BaseModel):
    """A frozen config that refuses unknown keys and conversions (1.5 is not a valid int, "8" is not a valid number)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


KIND = "kind"
Keys = tuple[str, ...]
"""The path of a value inside mappings and lists: keys, and numbers of list items as text."""
Parts = tuple[type[BaseModel], ...]
ModelT = TypeVar("ModelT", bound=BaseModel)


class WrongValue(UsageError):
    """A config or recipe has an invalid value, at `keys`."""

    def __init__(self, message: str, keys: Keys = (), *, path: str | None = None, hint: str | None = None):
        super().__init__(message, path=path, hint=hint)
        self.keys = keys


def parse_config(model: type[ModelT], values: Mapping[str, Any], *, where: str) -> ModelT:
    """Validate plain JSON values, laid over the model's defaults (see `merge`).

    WrongValue (exit code 2) names the place, what was found and what is expected.
    """
    try:
        text = json.dumps(merge(defaults(model, values), values), allow_nan=False)
    except (TypeError, ValueError) as error:
        sentence = f"{where} holds a value that is not a valid number, text, list or mapping: {error}"
        raise WrongValue(sentence, _keys_of_odd(values)) from error
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise WrongValue(explain(first, model, where), tuple(setting_name(first["loc"], model))) from error


def check_names(model: type[BaseModel], values: Mapping[str, Any], *, where: str) -> None:
    """UsageError where `values` are not valid for the config; required fields may be missing."""
    try:
        model.model_validate_json(json.dumps(merge(defaults(model, values), values)))
    except ValidationError as error:
        wrong = [item for item in error.errors(include_url=False) if item["type"] != "missing"]
        if wrong:
            raise UsageError(explain(wrong[0], model, where)) from error


def defaults(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a config as plain JSON values; required fields are left out.

    A part whose default is null has its own defaults as soon as `values` contain some of its settings.
    """
    fields = {name: field for name, field in model.model_fields.items() if not field.is_required()}
    found = {name: _plain(field.get_default(call_default_factory=True)) for name, field in fields.items()}
    for name, field in fields.items():
        asked, parts = values.get(name), parts_of(field.annotation)
        if found[name] is None and len(parts) == 1 and isinstance(asked, Mapping):
            found[name] = defaults(parts[0], asked)
    return found


def parts_of(annotation: Any) -> Parts:
    """The configs that a field of this annotation may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return tuple(part for item in get_args(annotation) for part in parts_of(item))
    return ()


def kinds_of(part: type[BaseModel]) -> tuple[str, ...]:
    """The values of `kind` that select this config."""
    return get_args(part.model_fields[KIND].annotation) if KIND in part.model_fields else ()


def merge(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` over `base`, merged recursively.

    A mapping with a `kind` replaces that of the base: another kind has other settings.
    """
    merged = dict(base)
    for name, value in values.items():
        under = merged.get(name)
        is_change = isinstance(value, Mapping) and "kind" not in value and isinstance(under, Mapping)
        merged[name] = merge(under, value) if is_change else value  # type: ignore[arg-type]  # both are mappings then
    return merged


def explain(complaint: ErrorDetails, model: type[BaseModel], where: str) -> str:
    """An error of pydantic as one sentence."""
    place = ".".join([where, *setting_name(complaint["loc"], model)])
    if complaint["type"] in ("union_tag_not_found", "union_tag_invalid"):
        return _wrong_kind(complaint["ctx"], f"{place}.{KIND}")
    if complaint["type"] == "extra_forbidden":
        return _unknown_field(complaint["loc"], place, model)
    if complaint["type"] == "missing":
        return f"{place} is missing"
    found = complaint.get("input")
    message = complaint["msg"].removeprefix("Value error, ")
    of_one_value = "" if isinstance(found, Mapping) else f" (found {json.dumps(found, default=str)[:80]})"
    return f"{place}: {message[0].lower()}{message[1:]}{of_one_value}"


def setting_name(location: Sequence[int | str], model: type[BaseModel]) -> list[str]:
    """A location of pydantic as the words of a setting's name, without the tags of unions."""
    return _walk(location, model)[0]


def _walk(location: Sequence[int | str], model: type[BaseModel]) -> tuple[list[str], Parts]:
    """The words of a setting's name, and the configs that are possible there."""
    words: list[str] = []
    parts: Parts = (model,)
    for item in location:
        known = [part.model_fields[item] for part in parts if isinstance(item, str) and item in part.model_fields]
        if not known and len(parts) > 1 and any(item in kinds_of(part) for part in parts):
            parts = tuple(part for part in parts if item in kinds_of(part))
            continue
        words.append(str(item))
        parts = parts_of(known[0].annotation) if known else ()
    return words, parts


def _wrong_kind(context: Mapping[str, Any], place: str) -> str:
    """The sentence for a part with a missing or unknown kind."""
    if "tag" not in context:
        return f"{place} is missing"
    known = [kind.strip("'") for kind in context["expected_tags"].split(", ")]
    nearest = difflib.get_close_matches(context["tag"], known, n=1, cutoff=0.5)
    advice = f"did you mean {nearest[0]!r}?" if nearest else f"known are: {', '.join(known)}"
    return f"{place} {context['tag']!r} is unknown: {advice}"


def _unknown_field(location: Sequence[int | str], place: str, model: type[BaseModel]) -> str:
    """The sentence for a setting that is not there, or is there in parts of other kinds alone."""
    where, _, key = place.rpartition(".")
    around = _walk(location[:-2], model)[1]
    kinds = [kind for part in around if key in part.model_fields for kind in kinds_of(part)]
    if kinds and any(location[-2] in kinds_of(part) for part in around):
        return f"{place} belongs to {KIND} {' or '.join(kinds)}, but {where}.{KIND} is {location[-2]}"
    return unknown_key(key, where, known_fields(location, model))


def unknown_key(key: str, where: str, known: list[str]) -> str:
    """The sentence for an unknown key, with the nearest known one."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    advice = f"did you mean {nearest[0]!r}?" if nearest else f"known are: {', '.join(sorted(known)[:20])}"
    return f"unknown key {key!r} in {where}: {advice}"


def known_fields(location: Sequence[int | str], model: type[BaseModel]) -> list[str]:
    """The names of the fields that are possible at a location of pydantic; of all parts if it is inside a list or mapping."""
    parts = _walk(location[:-1], model)[1]
    if parts:
        return sorted({name for part in parts for name in part.model_json_schema().get("properties", {})})
    schema = model.model_json_schema()
    return sorted({name for part in [schema, *schema.get("$defs", {}).values()] for name in part.get("properties", {})})


def _keys_of_odd(values: Any) -> Keys:
    """The keys of the first value that JSON cannot represent."""
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        try:
            json.dumps({key: value}, allow_nan=False)
        except (TypeError, ValueError):
            return (str(key), *_keys_of_odd(value))
    return ()


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value
