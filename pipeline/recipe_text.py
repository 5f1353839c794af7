"""The text of a recipe: strict YAML with the line of every value, merged over its base.

    base: rar-b.yaml                                # a path from this file's folder; a base may have a base
    title: RAR-L ...
    steps:
      generator: {config: {model: {size: l}}}       # differences; other values are the base's
      probe: null                                   # removes a step of the base

Mappings are merged key by key, steps by name; lists and scalars are replaced. A mapping that names another `kind`, and a
step that names another `stage`, replaces the base's. Null removes a value of the base, except where null is a valid value:
in a setting that may be null, and for a path that is to be given.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from pipeline.config import KIND, Keys
from pipeline.errors import InputError, UsageError
from pipeline.settings import settings_of
from pipeline.stage import Stage

BASE = "base"
TAGS = ("stage", KIND)


class _Constructor(SafeConstructor):
    """The library's constructor, which does not detect duplicate keys beside a merge key (<<)."""

    def flatten_mapping(self, node: Any) -> None:
        """Called for every mapping before its merge keys are resolved, and again after (then it has `merge`)."""
        count = Counter(str(key.value) for key, _ in node.value)
        twice = [key for key, _ in node.value if count[str(key.value)] > 1]
        if twice and getattr(node, "merge", None) is None:
            raise ConstructorError(None, None, f"the key {twice[-1].value!r} is a duplicate", twice[-1].start_mark)
        super().flatten_mapping(node)


@dataclass(frozen=True)
class Written:
    """The values of a recipe, and the origin of each: keys -> "FILE, line N"."""

    values: dict[str, Any]
    origins: dict[Keys, str]

    def origin(self, keys: Keys) -> str:
        """The origin of a value; for a missing one, that of the innermost mapping around it."""
        return next((self.origins[keys[:size]] for size in range(len(keys), 0, -1) if keys[:size] in self.origins), "")


class _Null:
    """Marks a null over a value of the base, until it is known whether null is a valid value there."""


_NULL = _Null()


def read_written(path: Path, stages: Mapping[str, Stage]) -> Written:
    """A recipe with all of its bases.

    Errors: InputError if a file cannot be read; UsageError if it is not valid YAML, or is its own base.
    """
    written = _read_chain(path, [])
    return Written(_settled(written.values, (), written.values, stages), written.origins)


def parse_yaml(text: str) -> Any:
    """A document of YAML 1.2 without duplicate keys; ValueError with what is not valid, and where."""
    return _parse(text, "")[0]


def _parse(text: str, file: str) -> tuple[Any, dict[Keys, str]]:
    """A YAML document and the line of every value."""
    yaml = YAML(typ="safe", pure=True)  # pure: the same reader with and without the C library
    yaml.Constructor = _Constructor
    try:
        node = yaml.compose(text)
        if node is None:
            return None, {}
        return yaml.constructor.construct_document(node), dict(_origins(node, file, ()))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{error.problem or error.context}{where}") from error
    except YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _origins(node: Node, file: str, keys: Keys) -> Iterator[tuple[Keys, str]]:
    """The origin of every value inside a node: the line of its key, or of the item of a list."""
    pairs: list[tuple[str, Node, Node]] = []
    if isinstance(node, MappingNode):
        pairs = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, SequenceNode):
        pairs = [(str(number), item, item) for number, item in enumerate(node.value)]
    for name, mark, value in pairs:
        yield (*keys, name), f"{file}, line {mark.start_mark.line + 1}"
        yield from _origins(value, file, (*keys, name))


def _read_chain(path: Path, chain: list[Path]) -> Written:
    """A recipe merged over its base. chain: the recipes that are based on it, the first one in front."""
    written = _read_file(path)
    if written.values.get(BASE) is None:
        return written
    base, origin = written.values[BASE], written.origins[(BASE,)]
    if not isinstance(base, str):
        raise UsageError(f"{origin}: base is not a path of a recipe (found {base!r})", path=path)
    following = Path(os.path.normpath(path.parent / base))
    chain = [*chain, path]
    if following.resolve() in [file.resolve() for file in chain]:
        names = " -> ".join(map(str, [*chain, following]))
        raise UsageError(f"{origin}: the bases of the recipe form a cycle: {names}", path=path)
    try:
        under = _read_chain(following, chain)
    except InputError as error:
        raise InputError(f"{origin}: {error.message}", path=error.path) from error
    values = _merged(under.values, written.values)
    left = {keys: line for keys, line in under.origins.items() if _is_there(values, keys)}
    return Written(values, left | written.origins)


def _read_file(path: Path) -> Written:
    try:
        values, origins = _parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise InputError(f"the recipe {path} cannot be read: {error.strerror}", path=path) from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid YAML: {error}", path=path) from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} is not a mapping with title and steps", path=path)
    return Written(values, origins)


def _merged(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` over those of the base; nulls over a value of the base are marked."""
    merged = dict(base)
    for name, value in values.items():
        under = base.get(name)
        if isinstance(value, dict) and isinstance(under, dict) and _is_change(under, value):
            merged[name] = _merged(under, value)
        else:
            merged[name] = _NULL if value is None and name in base else value
    return merged


def _is_change(base: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether a mapping is merged with that of the base, which has the same kind, instead of replacing it."""
    return all(values[tag] == base.get(tag) for tag in TAGS if isinstance(values.get(tag), str))


def _is_there(values: Any, keys: Keys) -> bool:
    for key in keys:
        if isinstance(values, list) and key.isdecimal() and int(key) < len(values):
            values = values[int(key)]
        elif isinstance(values, dict) and key in values:
            values = values[key]
        else:
            return False
    return True


def _settled(value: Any, keys: Keys, recipe: Mapping[str, Any], stages: Mapping[str, Stage]) -> Any:
    """A copy in which marked nulls are None, where null is a valid value, or removed. Anchors are no longer shared."""
    if isinstance(value, list):
        return [_settled(item, (*keys, str(number)), recipe, stages) for number, item in enumerate(value)]
    if not isinstance(value, dict):
        return None if value is _NULL else value
    places = {name: (*keys, str(name)) for name in value}
    kept = [name for name in value if value[name] is not _NULL or _takes_null(places[name], recipe, stages)]
    return {name: _settled(value[name], places[name], recipe, stages) for name in kept}


def _takes_null(keys: Keys, recipe: Mapping[str, Any], stages: Mapping[str, Stage]) -> bool:
    """Whether null is a valid value at these keys: a path that is to be given, or a setting that may be null."""
    match keys:
        case ("paths", _):
            return True
        case ("steps", step, "config", _, *_):
            declared = stages.get(recipe["steps"][step].get("stage"))
            name = ".".join(keys[3:])
            settings = settings_of(declared.config, recipe["steps"][step]["config"]) if declared else ()
            return any(type(None) in get_args(item.field.annotation) for item in settings if item.name == name)
    return False
