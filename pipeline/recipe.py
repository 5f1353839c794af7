"""Recipes: an experiment as a YAML file, validated strictly.

    title: RAR on handwritten digits ...
    paths:                                  # external data by name; given with --path images=/data/imagenet or --images
      images: null
    steps:
      train-images: {stage: index, config: {...}, paths: {images: "{images}/train"}}
      codebook:     {stage: kmeans, inputs: {features: features}, config: {clusters: 128}}

A step has a stage, inputs (other steps; a list where the stage takes many) and a config. The order of steps does not
matter. With `base: other.yaml` a recipe holds only its differences from another one (`pipeline.recipe_text`).
`--set codebook.clusters=64` changes a value of the result; the first word is a step, a pattern of several (`judge-*`), or one
of title, paths, steps.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from pipeline.config import Config, Keys, WrongValue, parse_config, unknown_key
from pipeline.errors import UsageError
from pipeline.outside_tokens import FOLDER, KIND, OUTSIDE
from pipeline.recipe_text import BASE, Written, parse_yaml, read_written
from pipeline.settings import schema_of
from pipeline.stage import Read, Stage, imply

RECIPES = "recipes"
VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
VARIABLE = re.compile(r"\{(.*?)\}")
OUTSIDE_NAME = "{"  # marks a path; no step's name contains it
STEP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # used in refs and --set: no slash, no dot


class StepText(Config):
    """One step as written."""

    stage: str = Field(description="name of the stage (see `smalti --help`)")
    config: dict[str, Any] = Field(
        default_factory=dict, description="settings of the stage; others have their defaults"
    )
    inputs: dict[str, str | list[str]] = Field(
        default_factory=dict,
        description="input of the stage -> step that makes it, or a token set's folder: \"{name}\" of the recipe's paths",
    )
    paths: dict[str, str] = Field(
        default_factory=dict, description='external data -> path; "{name}" stands for an entry of the recipe\'s paths'
    )


class RecipeText(Config):
    """A recipe as written."""

    base: str | None = Field(
        default=None, description="path of another recipe, relative to this one, whose values this one overrides"
    )
    title: str = Field(description="what the recipe reproduces, and the published figure that it aims at")
    paths: dict[str, str | None] = Field(
        default_factory=dict, description="external data by name; null: to be given on the command line"
    )
    steps: dict[str, StepText] = Field(description="name of the step -> stage, inputs, config and paths")


@dataclass(frozen=True)
class Step:
    """One validated step: its stage's declaration, its config, its inputs, its external paths.

    paths: external name -> path, without those whose variable was not given.  missing: these variables' names.
    given: the written settings, without defaults.
    """

    name: str
    stage: Stage
    config: BaseModel
    inputs: dict[str, str | list[str]]
    paths: dict[str, Path]
    missing: tuple[str, ...]
    given: Mapping[str, Any] = field(default_factory=dict)

    def parents(self) -> list[str]:
        return [name for value in self.inputs.values() for name in (value if isinstance(value, list) else [value])]


@dataclass(frozen=True)
class Recipe:
    """A validated recipe; `steps` are in an order in which they can run."""

    name: str
    title: str
    steps: tuple[Step, ...]

    @property
    def base(self) -> str:
        """The name without the variant's."""
        return self.name.partition("@")[0]

    def variant(self, name: str) -> Recipe:
        """The same recipe with its own refs, <recipe>@<name>/<step>; UsageError for an invalid name."""
        if not VARIANT.fullmatch(name):
            raise UsageError(f"--as {name!r} is not a valid name: expected letters, digits, -, _ and .")
        return replace(self, name=f"{self.base}@{name}")


def load_recipe(
    path: Path,
    stages: Mapping[str, Stage],
    *,
    settings: Sequence[str] = (),
    paths: Mapping[str, str] | None = None,
) -> Recipe:
    """Read a recipe; `settings` are `dotted.key=value` texts, `paths` fill the recipe's external data.

    Errors: InputError if the file cannot be read, UsageError (exit code 2) if it is not valid.
    """
    written = read_written(path, stages)
    for setting in settings:
        _apply(written, setting)
    try:
        return _validate(written.values, stages, paths or {}, path)
    except WrongValue as error:
        origin = written.origin(error.keys)
        raise UsageError(f"{origin}: {error.message}" if origin else error.message) from error


def _validate(values: Mapping[str, Any], stages: Mapping[str, Stage], paths: Mapping[str, str], path: Path) -> Recipe:
    text = parse_config(RecipeText, values, where=path.name)
    for name in paths:
        if name not in text.paths:
            raise UsageError(unknown_key(name, f"the paths of {path.name}", list(text.paths)))
    variables = {**text.paths, **paths}
    written = {name: _step(name, step, stages, text, variables, path.name) for name, step in text.steps.items()}
    steps = {**_outside(written, variables), **written}
    return Recipe(recipe_name(path), text.title, tuple(steps[name] for name in _order(steps, path.name)))


def recipe_name(path: Path) -> str:
    """`recipes/digits/rar.yaml` is digits/rar; a file elsewhere is called by its stem."""
    parts = Path(os.path.abspath(path)).with_suffix("").parts  # noqa: PTH100  (`..` is taken out, links are kept)
    inside = parts[:-1][::-1].index(RECIPES) if RECIPES in parts[:-1] else 0
    return "/".join(parts[-1 - inside :])


def recipe_schema(stages: Mapping[str, Stage]) -> dict[str, Any]:
    """JSON schema of recipes for editors: every stage's config with its help texts."""
    schema = RecipeText.model_json_schema()
    step = schema["$defs"].pop("StepText")
    needed = schema.pop("required")
    variants = []
    for name, declared in sorted(stages.items()):
        schema["$defs"][f"{name}-config"] = _config_schema(declared, schema["$defs"])
        properties = {
            **step["properties"],
            "stage": {"const": name, "description": declared.help.strip().split("\n")[0]},
        }
        properties["config"] = {"$ref": f"#/$defs/{name}-config"}
        properties["inputs"] = _inputs_schema(declared)
        variants.append(
            {"type": "object", "properties": properties, "required": ["stage"], "additionalProperties": False}
        )
    steps = schema["properties"]["steps"]
    steps["propertyNames"] = {"pattern": f"^{STEP_NAME.pattern}$"}
    steps["additionalProperties"] = True
    schema["$defs"] |= {"step": {"oneOf": variants}, "change-of-step": _change_schema(step["properties"])}
    return {
        **schema,
        "if": {"required": [BASE], "properties": {BASE: {"type": "string"}}},
        "then": _steps_schema("change-of-step"),
        "else": _steps_schema("step") | {"required": needed},
    }


def _steps_schema(name: str) -> dict[str, Any]:
    return {"properties": {"steps": {"additionalProperties": {"$ref": f"#/$defs/{name}"}}}}


def _change_schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a step over that of a base: a whole step, its differences, or null to remove it."""
    changes = {}
    for name in ("config", "inputs", "paths"):
        values = properties[name]["additionalProperties"]
        anything = {"anyOf": [values, {"type": "null"}]} if isinstance(values, dict) else True
        changes[name] = {**properties[name], "additionalProperties": anything}
    part = {"type": "object", "properties": changes, "additionalProperties": False}
    return {"anyOf": [{"$ref": "#/$defs/step"}, part, {"type": "null"}]}


def _config_schema(declared: Stage, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a stage's settings; defaults that only suit the digits are removed."""
    schema = schema_of(declared.config, {}, definitions)
    for name in declared.digits_defaults:
        part, _, key = name.partition(".")
        found = schema["properties"][part]["anyOf"][0]["properties"][key]
        found["description"] = (
            f"{found['description']} ({found.pop('default')} for the digits, needed for other images)"
        )
    return schema


def _inputs_schema(declared: Stage) -> dict[str, Any]:
    one = {"type": "string"}
    many = {"type": "array", "items": one}
    properties = {name: {"anyOf": [one, many]} if item.many else one for name, item in declared.reads.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def parse_setting(setting: str) -> tuple[list[str], Any]:
    """`a.b=c` as (["a", "b"], value); the value is YAML: 3, 1e-3, true, [1, 2], text."""
    name, equals, text = setting.partition("=")
    if not equals or not all(name.split(".")):
        raise UsageError(f"--set {setting!r}: expected dotted.key=value")
    try:
        return name.split("."), parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"--set {setting!r}: the value is not valid YAML: {error}") from error


def put_setting(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set the value at `keys`, creating mappings as needed."""
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise UsageError(f"--set {'.'.join(keys)}: {key} is not a mapping")
    values[keys[-1]] = value


def _apply(written: Written, setting: str) -> None:
    keys, value = parse_setting(setting)
    for place in _places(keys, written.values.get("steps"), setting):
        put_setting(written.values, place, deepcopy(value))
        for former in [former for former in written.origins if former[: len(place)] == place]:
            del written.origins[former]
        written.origins[place] = f"--set {setting}"


def _places(keys: list[str], steps: Any, setting: str) -> list[Keys]:
    """Where a setting belongs: at one place of the recipe, or at the same one in all steps of a pattern."""
    known = [name for name in RecipeText.model_fields if name != BASE]
    if keys[0] in known:
        return [tuple(keys)]
    names = fnmatch.filter(map(str, steps), keys[0]) if isinstance(steps, dict) else []
    if not names:
        raise UsageError(unknown_key(keys[0], f"--set {setting}", [*known, *(steps or ())]))
    part = [] if keys[1:2] in (["config"], ["inputs"], ["paths"], ["stage"]) else ["config"]
    return [("steps", name, *part, *keys[1:]) for name in names]


def _step(
    name: str,
    text: StepText,
    stages: Mapping[str, Stage],
    recipe: RecipeText,
    variables: Mapping[str, str | None],
    where: str,
) -> Step:
    place, keys = f"{where}: steps.{name}", ("steps", name)
    if not STEP_NAME.fullmatch(name):
        raise WrongValue(f"{where}: {name!r} is not a valid name for a step: expected letters, digits, - and _", keys)
    if text.stage not in stages:
        raise WrongValue(unknown_key(text.stage, f"{place}.stage", list(stages)), (*keys, "stage"))
    declared = stages[text.stage]
    _check_inputs(declared, text, recipe, place, (*keys, "inputs"))
    try:
        config = parse_config(declared.config, imply(declared, text.config, text.paths), where=f"{place}.config")
    except WrongValue as error:
        raise WrongValue(error.message, (*keys, "config", *error.keys)) from error
    paths, missing = _fill_paths(declared, config, text, variables, place, (*keys, "paths"))
    parents = [parent for value in text.inputs.values() for parent in ([value] if isinstance(value, str) else value)]
    missing += tuple(lacking for parent in parents for lacking in _fill(parent, variables)[1])
    return Step(name, declared, config, dict(text.inputs), paths, tuple(dict.fromkeys(missing)), text.config)


def _check_inputs(declared: Stage, text: StepText, recipe: RecipeText, place: str, keys: Keys) -> None:
    for name, value in text.inputs.items():
        at, there = f"{place}.inputs.{name}", (*keys, name)
        if name not in declared.reads:
            raise WrongValue(unknown_key(name, f"{place}.inputs", list(declared.reads)), there)
        if isinstance(value, list) and not declared.reads[name].many:
            raise WrongValue(f"{at} takes one step, found a list", there)
        for parent in value if isinstance(value, list) else [value]:
            if OUTSIDE_NAME in parent:
                _check_outside(declared.reads[name], parent, recipe, at, there)
            elif parent not in recipe.steps:
                raise WrongValue(unknown_key(parent, at, list(recipe.steps)), there)
    absent = [name for name, item in declared.reads.items() if not item.optional and name not in text.inputs]
    if absent:
        raise WrongValue(f"{place}.inputs lacks {', '.join(absent)} (stage {declared.name})", keys)


def _fill_paths(
    declared: Stage, config: BaseModel, text: StepText, variables: Mapping[str, str | None], place: str, keys: Keys
) -> tuple[dict[str, Path], tuple[str, ...]]:
    filled, missing = {}, []
    for name, template in text.paths.items():
        if name not in declared.externals:
            raise WrongValue(unknown_key(name, f"{place}.paths", list(declared.externals)), (*keys, name))
        _check_variables(template, variables, f"{place}.paths.{name}", (*keys, name))
        path, absent = _fill(template, variables)
        missing += absent
        if path is not None:
            filled[name] = path
    given = {*filled, *(name for name in text.paths if name not in filled)}
    for name, external in declared.externals.items():
        if external.needed(config) and name not in given:
            raise WrongValue(f"{place}.paths lacks {name}: {external.help}", keys)
    return filled, tuple(missing)


def _check_outside(wanted: Read, template: str, recipe: RecipeText, place: str, keys: Keys) -> None:
    """WrongValue for a path as an input that is not a token set, or with an unknown variable."""
    _check_variables(template, recipe.paths, place, keys)
    if KIND not in wanted.kinds:
        raise WrongValue(f"{place} is {template!r}, but only a {KIND} may lie outside of the store: name a step", keys)


def _check_variables(template: str, variables: Mapping[str, Any], place: str, keys: Keys) -> None:
    for variable in VARIABLE.findall(template):
        if variable not in variables:
            raise WrongValue(unknown_key(variable, f"{place} ({template})", list(variables)), keys)


def _fill(template: str, variables: Mapping[str, str | None]) -> tuple[Path | None, list[str]]:
    """The path of a template, or None, and the names of the variables that are not given."""
    absent = [variable for variable in VARIABLE.findall(template) if variables[variable] is None]
    return (None if absent else Path(VARIABLE.sub(lambda match: str(variables[match[1]]), template))), absent


def _outside(steps: Mapping[str, Step], variables: Mapping[str, str | None]) -> dict[str, Step]:
    """A step for every token set outside of the store that is an input, by its template in the recipe."""
    found: dict[str, Step] = {}
    for template in (parent for step in steps.values() for parent in step.parents() if OUTSIDE_NAME in parent):
        path, absent = _fill(template, variables)
        paths = {} if path is None else {FOLDER: path}
        found[template] = Step(template, OUTSIDE, Config(), {}, paths, tuple(absent))
    return found


def _order(steps: Mapping[str, Step], where: str) -> list[str]:
    graph = {name: step.parents() for name, step in steps.items()}
    try:
        found = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        names = error.args[1]
        raise WrongValue(
            f"{where}: the inputs of the steps {' -> '.join(names)} form a cycle", ("steps", names[0], "inputs")
        ) from error
    position = {name: index for index, name in enumerate(steps)}
    depth: dict[str, int] = {}
    for name in found:
        depth[name] = max([position[name], *(depth[parent] for parent in graph[name])])
    # Steps without inputs come first: then an image folder's classes are known before anything is computed.
    return sorted(found, key=lambda name: (bool(graph[name]), depth[name], found.index(name)))


def dump_schema(stages: Mapping[str, Stage]) -> str:
    return json.dumps(recipe_schema(stages), indent=2, sort_keys=True) + "\n"
