"""The settings of a config: every field with its value or default.

Options and help of commands, `smalti config` and the JSON schema of recipes are made from them. Defaults are those of
`parse_config`, so the shown values are those of the manifest.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from pipeline.config import KIND, Parts, defaults, kinds_of, merge, parts_of

Definitions = dict[str, Any]
"""Schemas by the names of their config classes, for `$ref`."""


class Required:
    """The value of a setting that has no default."""

    def __repr__(self) -> str:
        return "required"


REQUIRED: Final = Required()


@dataclass(frozen=True)
class Setting:
    """One field of a config, or of a config inside it.

    name: dotted.  value: JSON, or REQUIRED.  choices: the values of an enumeration.  parts: the configs that it may be, a
    union by `kind`.  within: the name of the optional part around it, whose values count as soon as one of its settings is
    given.  kinds: those of the part around it that have the setting, if the present kind has not.  is_for_digits: the
    default only suits the embedded digits; for other images a value must be given.
    """

    name: str
    field: FieldInfo
    value: Any
    choices: tuple[Any, ...] = ()
    parts: Parts = ()
    within: str = ""
    kinds: tuple[str, ...] = ()
    is_for_digits: bool = False

    @property
    def key(self) -> str:
        """The last word of its name."""
        return self.name.rpartition(".")[2]

    @property
    def text(self) -> str:
        """Its description."""
        return self.field.description or ("which kind" if self.key == KIND else "")

    @property
    def type(self) -> str:
        """Type and range in words, such as `integer, at least 1`."""
        if self.choices:
            words = "one of " + ", ".join(map(str, self.choices))
            return f"{words}, or null" if type(None) in get_args(self.field.annotation) else words
        return "settings" if self.parts else _words(value_schema(self.field))


def settings_of(
    model: type[BaseModel],
    given: Mapping[str, Any] | None = None,
    *,
    place: str = "",
    within: str = "",
    all_kinds: bool = False,
) -> Iterator[Setting]:
    """Every setting of a config with the values `given`, in the order of the fields, a part before its own settings.

    Of a part with several kinds, the settings are those of its present kind; while it is absent, its kind and the
    settings that all kinds share.  all_kinds: after them, the settings that only other kinds have.
    """
    given = given or {}
    values = merge(defaults(model, given), given)
    for name, field in fields_of(model):
        value, parts = values.get(name, REQUIRED), parts_of(field.annotation)
        yield Setting(place + name, field, value, choices_of(field.annotation), parts, within)
        if not parts:
            continue
        inside = {
            "place": f"{place}{name}.",
            "within": within if isinstance(value, Mapping) else within or place + name,
        }
        part, values_inside = part_of(parts, value), value if isinstance(value, Mapping) else {}
        if part is None:
            found = list(_common(parts, **inside))
        else:
            found = list(_with_all_kinds(settings_of(part, values_inside, **inside, all_kinds=all_kinds), parts))
        yield from found
        if all_kinds:
            yield from _of_other_kinds(parts, {setting.name for setting in found}, **inside)


def schema_of(model: type[BaseModel], given: Mapping[str, Any], definitions: Definitions) -> dict[str, Any]:
    """The JSON schema of changes to a config that has the values of `given`: nothing is required, defaults are these values.

    A part with a kind may be changed without naming the kind, or replaced with it: then it has the defaults of that kind,
    and its schema is added to the definitions.
    """
    values = merge(defaults(model, given), given)
    properties = {
        name: _field_schema(field, values.get(name, REQUIRED), definitions) for name, field in fields_of(model)
    }
    about = {"description": inspect.cleandoc(model.__doc__)} if model.__doc__ else {}
    return {"type": "object", **about, "properties": properties, "additionalProperties": False}


def value_at(values: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted name in nested mappings; REQUIRED if it is missing."""
    found: Any = values
    for word in name.split("."):
        if not isinstance(found, Mapping) or word not in found:
            return REQUIRED
        found = found[word]
    return found


def fields_of(model: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    """The fields of a config, its kind first."""
    return sorted(model.model_fields.items(), key=lambda item: item[0] != KIND)


def part_of(parts: Parts, value: Any) -> type[BaseModel] | None:
    """The part that a value selects by its kind, or None."""
    if len(parts) == 1:
        return parts[0]
    named = value.get(KIND) if isinstance(value, Mapping) else None
    return next((part for part in parts if named in kinds_of(part)), None)


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """The values of a field whose annotation is a Literal, or one or null."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        items = [item for item in get_args(annotation) if item is not type(None)]
        return choices_of(items[0]) if len(items) == 1 else ()
    return ()


def value_schema(field: FieldInfo) -> dict[str, Any]:
    """The JSON schema of a field that holds no config: its type and its range."""
    annotation: Any = field.annotation
    for limit in field.metadata:
        annotation = Annotated[annotation, limit]
    return TypeAdapter(annotation).json_schema()


def _common(parts: Parts, *, place: str, within: str) -> Iterator[Setting]:
    """The kind of an absent part, and the settings that all kinds have."""
    shared = set.intersection(*(set(part.model_fields) for part in parts))
    for setting in _with_all_kinds(settings_of(parts[0], place=place, within=within), parts):
        if setting.name.removeprefix(place) in shared:
            yield replace(setting, value=REQUIRED) if setting.key == KIND else setting


def _of_other_kinds(parts: Parts, known: set[str], *, place: str, within: str) -> Iterator[Setting]:
    """The settings that are not known yet, each with the kinds that have it so; once per meaning and default."""
    found: dict[tuple[str, str, str], Setting] = {}
    for part in parts:
        for setting in settings_of(part, place=place, within=within, all_kinds=True):
            if setting.name not in known:
                told = setting.name, setting.text, repr(setting.value)
                kinds = found[told].kinds if told in found else ()
                found[told] = replace(setting, kinds=setting.kinds or kinds + kinds_of(part))
    yield from found.values()


def _with_all_kinds(settings: Iterator[Setting], parts: Parts) -> Iterator[Setting]:
    """The settings of a part, with the kinds of all parts as choices of the first, its kind."""
    kinds = tuple(kind for part in parts for kind in kinds_of(part))
    first = next(settings)
    yield replace(first, choices=kinds) if first.key == KIND else first
    yield from settings


def _field_schema(field: FieldInfo, value: Any, definitions: Definitions) -> dict[str, Any]:
    about = {"description": field.description} if field.description else {}
    default = {} if value is REQUIRED or isinstance(value, Mapping) else {"default": value}
    parts = parts_of(field.annotation)
    if not parts:
        return {**value_schema(field), **default, **about}
    changed = [_changes(part_of(parts, value), value, definitions)] if isinstance(value, Mapping) else []
    fresh = [_fresh(part, definitions) for part in parts if KIND in part.model_fields or not changed]
    others = [TypeAdapter(item).json_schema() for item in get_args(field.annotation) if _is_plain(item)]
    return {"anyOf": [*changed, *fresh, *others], **default, **about}


def _changes(part: type[BaseModel] | None, value: Mapping[str, Any], definitions: Definitions) -> dict[str, Any]:
    """Changes to a part that leave its kind as it is."""
    assert part is not None, "a default names its kind"
    schema = schema_of(part, value, definitions)
    schema["properties"].pop(KIND, None)
    return schema


def _fresh(part: type[BaseModel], definitions: Definitions) -> dict[str, Any]:
    """A part that replaces another one, with the defaults of its kind."""
    name = part.__name__
    if name not in definitions:
        schema = schema_of(part, {}, definitions)
        more = part.model_config.get("json_schema_extra")
        if callable(more):
            more(schema, part)  # type: ignore[call-arg]  # pydantic allows one argument, ours take both
        definitions[name] = {**schema, "required": [KIND]} if KIND in part.model_fields else schema
    return {"$ref": f"#/$defs/{name}"}


def _is_plain(item: Any) -> bool:
    return not parts_of(item) and not isinstance(item, FieldInfo)


def _words(schema: Mapping[str, Any]) -> str:
    """A JSON schema of one value in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_words(item) for item in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return "one of " + ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    words = str(schema.get("type", "mapping"))
    if words == "array":
        item = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
        words = f"list of {_words(item)}" if item else "list"
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    found = [f"{limits[name]} {schema[name]}" for name in limits if name in schema]
    found += [f"a multiple of {schema['multipleOf']}"] if "multipleOf" in schema else []
    return ", ".join([words, *found])
