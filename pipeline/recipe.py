"""Recipes: a whole experiment on one page of YAML, read strictly.

    title: RAR on handwritten digits ...
    paths:                                  # external data by name; given with --path images=/data/imagenet or --images
      images: null
    steps:
      train-images: {stage: index, config: {...}, paths: {images: "{images}/train"}}
      codebook:     {stage: kmeans, inputs: {features: features}, config: {clusters: 128}}

A step names its stage, its inputs (other steps; a list where the stage takes many) and its config. Steps may stand in any
order. `--set codebook.clusters=64` changes a value; the first word is a step or one of title, paths, steps.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field

from pipeline.config import Config, parse_config, unknown_key
from pipeline.errors import InputError, UsageError
from pipeline.outside import FOLDER, KIND, OUTSIDE
from pipeline.settings import schema_of
from pipeline.stage import Read, Stage, imply

RECIPES = "recipes"
VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
VARIABLE = re.compile(r"\{(.*?)\}")
OUTSIDE_NAME = "{"  # no step's name holds it
STEP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # a part of a ref and of --set: no slash, no dot


class StrictLoader(yaml.SafeLoader):
    """YAML without its traps: a key that stands twice is refused, and 1e-3 is a number (YAML 1.1 reads a word)."""

    def __init__(self, stream: Any):
        super().__init__(stream)
        self._seen: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Called for every mapping before its merge keys (<<) are dissolved into it, and for dissolved ones again."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice and id(node) not in self._seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
        self._seen.add(id(node))
        super().flatten_mapping(node)


StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """A YAML document, read strictly; raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=StrictLoader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deep") from error


class StepText(Config):
    """One step as written."""

    stage: str = Field(description="name of the stage (see `smalti --help`)")
    config: dict[str, Any] = Field(
        default_factory=dict, description="settings of the stage; what is left out has its default"
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

    title: str = Field(description="what this is, and the published figure that it aims at")
    paths: dict[str, str | None] = Field(
        default_factory=dict, description="external data by name; null: to be given on the command line"
    )
    steps: dict[str, StepText] = Field(description="name of the step -> what it does")


@dataclass(frozen=True)
class Step:
    """One step, validated: its stage's declaration, its config, where its inputs come from, its external paths.

    paths: external name -> path, or None where the recipe's variable was not given.  missing: these variables' names.
    given: the settings as they are written, without defaults.
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
        """The name without that of a variant."""
        return self.name.partition("@")[0]

    def variant(self, name: str) -> Recipe:
        """The same recipe under refs of its own, <recipe>@<name>/<step>; UsageError for what cannot be a name."""
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

    Errors: InputError if the file cannot be read, UsageError (exit code 2) for everything that is written wrongly.
    """
    document = _read(path)
    for setting in settings:
        _apply(document, setting)
    text = parse_config(RecipeText, document, where=path.name)
    for name in paths or {}:
        if name not in text.paths:
            raise UsageError(unknown_key(name, f"the paths of {path.name}", list(text.paths)))
    variables = {**text.paths, **(paths or {})}
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
    schema["properties"]["steps"]["additionalProperties"] = {"oneOf": variants}
    schema["properties"]["steps"]["propertyNames"] = {"pattern": f"^{STEP_NAME.pattern}$"}
    return schema


def _config_schema(declared: Stage, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a stage's settings; what suits the digits alone is no default for other images."""
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


def _read(path: Path) -> dict[str, Any]:
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the recipe {path} cannot be read: {error.strerror}", path=path) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no valid YAML: {' '.join(str(error).split())}", path=path) from error
    if not isinstance(document, dict):
        raise UsageError(f"{path} holds no mapping with title and steps", path=path)
    return document


def parse_setting(setting: str) -> tuple[list[str], Any]:
    """`a.b=c` as (["a", "b"], value); the value is read as YAML, so 3, 1e-3, true, [1, 2] and words are what they seem."""
    name, equals, text = setting.partition("=")
    if not equals or not all(name.split(".")):
        raise UsageError(f"--set {setting!r}: expected dotted.key=value")
    try:
        return name.split("."), parse_yaml(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {setting!r}: the value is no valid YAML") from error


def put_setting(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Put `value` at the dotted place, making mappings on the way."""
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise UsageError(f"--set {'.'.join(keys)}: {key} is no mapping")
    values[keys[-1]] = value


def _apply(document: dict[str, Any], setting: str) -> None:
    keys, value = parse_setting(setting)
    steps = document.get("steps")
    if keys[0] not in RecipeText.model_fields:
        if not isinstance(steps, dict) or keys[0] not in steps:
            known = [*RecipeText.model_fields, *(steps if isinstance(steps, dict) else {})]
            raise UsageError(unknown_key(keys[0], f"--set {setting}", known))
        keys = [
            "steps",
            keys[0],
            *([] if keys[1:2] in (["config"], ["inputs"], ["paths"], ["stage"]) else ["config"]),
            *keys[1:],
        ]
    put_setting(document, keys, value)


def _step(
    name: str,
    text: StepText,
    stages: Mapping[str, Stage],
    recipe: RecipeText,
    variables: Mapping[str, str | None],
    where: str,
) -> Step:
    place = f"{where}: steps.{name}"
    if not STEP_NAME.fullmatch(name):
        raise UsageError(f"{where}: {name!r} is no name for a step: expected letters, digits, - and _")
    if text.stage not in stages:
        raise UsageError(unknown_key(text.stage, f"{place}.stage", list(stages)))
    declared = stages[text.stage]
    _check_inputs(declared, text, recipe, place)
    config = parse_config(declared.config, imply(declared, text.config, text.paths), where=f"{place}.config")
    paths, missing = _fill_paths(declared, config, text, variables, place)
    parents = [parent for value in text.inputs.values() for parent in ([value] if isinstance(value, str) else value)]
    missing += tuple(lacking for parent in parents for lacking in _fill(parent, variables)[1])
    return Step(name, declared, config, dict(text.inputs), paths, tuple(dict.fromkeys(missing)), text.config)


def _check_inputs(declared: Stage, text: StepText, recipe: RecipeText, place: str) -> None:
    for name, value in text.inputs.items():
        if name not in declared.reads:
            raise UsageError(unknown_key(name, f"{place}.inputs", list(declared.reads)))
        if isinstance(value, list) and not declared.reads[name].many:
            raise UsageError(f"{place}.inputs.{name} takes one step, found a list")
        for parent in value if isinstance(value, list) else [value]:
            if OUTSIDE_NAME in parent:
                _check_outside(declared.reads[name], parent, recipe, f"{place}.inputs.{name}")
            elif parent not in recipe.steps:
                raise UsageError(unknown_key(parent, f"{place}.inputs.{name}", list(recipe.steps)))
    absent = [name for name, item in declared.reads.items() if not item.optional and name not in text.inputs]
    if absent:
        raise UsageError(f"{place}.inputs lacks {', '.join(absent)} (stage {declared.name})")


def _fill_paths(
    declared: Stage, config: BaseModel, text: StepText, variables: Mapping[str, str | None], place: str
) -> tuple[dict[str, Path], tuple[str, ...]]:
    filled, missing = {}, []
    for name, template in text.paths.items():
        if name not in declared.externals:
            raise UsageError(unknown_key(name, f"{place}.paths", list(declared.externals)))
        _check_variables(template, variables, f"{place}.paths.{name}")
        path, absent = _fill(template, variables)
        missing += absent
        if path is not None:
            filled[name] = path
    given = {*filled, *(name for name in text.paths if name not in filled)}
    for name, external in declared.externals.items():
        if external.needed(config) and name not in given:
            raise UsageError(f"{place}.paths lacks {name}: {external.help}")
    return filled, tuple(missing)


def _check_outside(wanted: Read, template: str, recipe: RecipeText, place: str) -> None:
    """UsageError for a path in the place of an input that is not a token set, or with a name that the recipe lacks."""
    _check_variables(template, recipe.paths, place)
    if KIND not in wanted.kinds:
        raise UsageError(f"{place} is {template!r}, but only a {KIND} may lie outside of the store: name a step")


def _check_variables(template: str, variables: Mapping[str, Any], place: str) -> None:
    for variable in VARIABLE.findall(template):
        if variable not in variables:
            raise UsageError(unknown_key(variable, f"{place} ({template})", list(variables)))


def _fill(template: str, variables: Mapping[str, str | None]) -> tuple[Path | None, list[str]]:
    """The path that a template stands for; None, and the names of the variables that are not given."""
    absent = [variable for variable in VARIABLE.findall(template) if variables[variable] is None]
    return (None if absent else Path(VARIABLE.sub(lambda match: str(variables[match[1]]), template))), absent


def _outside(steps: Mapping[str, Step], variables: Mapping[str, str | None]) -> dict[str, Step]:
    """A step for every token set outside of the store that is an input, by what stands in the recipe for it."""
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
        raise UsageError(f"{where}: the steps {' -> '.join(error.args[1])} wait for each other") from error
    position = {name: index for index, name in enumerate(steps)}
    depth: dict[str, int] = {}
    for name in found:
        depth[name] = max([position[name], *(depth[parent] for parent in graph[name])])
    # What reads no other step comes first: an image folder's classes are known before anything is computed.
    return sorted(found, key=lambda name: (bool(graph[name]), depth[name], found.index(name)))


def dump_schema(stages: Mapping[str, Stage]) -> str:
    return json.dumps(recipe_schema(stages), indent=2, sort_keys=True) + "\n"
