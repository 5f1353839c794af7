"""A typer command for every stage, generated from its declaration: `smalti kmeans --features digits/rar/features`.

Inputs are refs, keys, their beginnings, or paths of artifacts; an image set may also be a plain folder or the word
`digits`, which is indexed first, and a network may be a published weight file, which is imported first. Simple config fields are options of their own, all others are reached with --set.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cli.options import COMMON, SetOption, running
from cli.output import guarded, print_json, say
from pipeline.artifact import MANIFEST, Artifact
from pipeline.config import parse_config
from pipeline.errors import InputError, UsageError
from pipeline.recipe import parse_setting, parse_yaml, put_setting
from pipeline.runner import Made, Options, make, make_request
from pipeline.stage import Inputs, Read, Stage
from pipeline.store import Store
from stages import stages
from stages.foreign import SUFFIXES
from stages.import_weights import config_of

SCALARS = (int, float, str, bool)


def stage_command(declared: Stage) -> Callable[..., None]:
    """The command function of one stage, with a signature that typer turns into options."""

    def command(**values: Any) -> None:
        _run(declared, values)

    parameters = [*_inputs(declared), *_externals(declared), *_fields(declared), *_common()]
    command.__name__ = declared.name.replace("-", "_")
    command.__doc__ = f"{inspect.cleandoc(declared.help)}\n\nExample: {declared.example}"
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return guarded(command)


def _run(declared: Stage, values: dict[str, Any]) -> None:
    store = Store(values["store"])
    config = parse_config(declared.config, _config_values(declared, values), where=declared.name)
    given = {name: values.get(_variable(name)) for name in declared.externals}
    paths = {name: path for name, path in given.items() if path is not None}
    for name, external in declared.externals.items():
        if name not in paths and external.needed(config):
            raise UsageError(f"{declared.name} lacks --{_flag(name)}: {external.help}")
    if values["ref"]:
        store.ref_path(values["ref"])  # a name that cannot be is refused before the work
    if values["dry_run"]:
        _say_plan(declared, config, values, paths, store)
        return
    with running(values) as options:
        inputs = Inputs(_find_inputs(declared, values, lambda text, wanted: _find(text, wanted, store, options)))
        made = make(store, declared, config, inputs, paths, options)
        if values["ref"]:
            store.set_ref(values["ref"], made.artifact)
    _show(made, values["json"], values["quiet"])


def _config_values(declared: Stage, values: dict[str, Any]) -> dict[str, Any]:
    """Config as plain values: the file of --config, then the options, then --set."""
    found: dict[str, Any] = _read_config(values["config"], declared) if values["config"] else {}
    for name, kind, _ in _simple_fields(declared.config):
        given = values.get(_argument(name))
        if given is not None:
            put_setting(found, name.split("."), _parse_list(name, given) if kind is list else given)
    for setting in values["set"] or []:
        keys, value = parse_setting(setting)
        put_setting(found, keys, value)
    return found


def _parse_list(name: str, text: str) -> list[Any]:
    try:
        return list(parse_yaml(f"[{text}]"))
    except yaml.YAMLError as error:
        raise UsageError(f"--{_flag(name)} {text!r}: expected values separated by commas") from error


def _read_config(text: str, declared: Stage) -> dict[str, Any]:
    """Settings from a YAML file, or from one step of a recipe: FILE.yaml or RECIPE.yaml:step."""
    name, _, step = text.partition(":")
    try:
        document = parse_yaml(Path(name).read_text(encoding="utf-8"))
        if step:
            document = document["steps"][step].get("config", {})
    except OSError as error:
        raise InputError(f"--config {name} cannot be read: {error.strerror}", path=name) from error
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--config {text} holds no settings of {declared.name}") from error
    if not isinstance(document, dict):
        raise UsageError(f"--config {text} holds no mapping")
    return document


def _find_inputs(
    declared: Stage, values: dict[str, Any], find: Callable[[str, Read], Artifact]
) -> dict[str, Artifact | list[Artifact]]:
    found: dict[str, Artifact | list[Artifact]] = {}
    for name, wanted in declared.reads.items():
        given = values.get(_variable(name))
        if not given:
            if not wanted.optional:
                raise UsageError(
                    f"{declared.name} lacks --{_flag(name)}: {wanted.help or 'a ' + ' or '.join(wanted.kinds)}"
                )
            continue
        items = [find(text, wanted) for text in (given if isinstance(given, list) else [given])]
        found[name] = items if wanted.many else items[0]
    return found


def _find(text: str, wanted: Read, store: Store, options: Options) -> Artifact:
    """The artifact that a word on the command line means; what is none yet is put into the store first."""
    source = _source(text, wanted)
    if source is None:
        return store.find(text)
    made = make(store, source.stage, source.config, Inputs({}), source.paths, options)
    if not made.reused:
        options.progress.say(f"put {text} into the store as {made.artifact.name}")
    return made.artifact


class _Source(NamedTuple):
    """Data outside the store, and the step that brings it in."""

    stage: Stage
    config: BaseModel
    paths: dict[str, Path]


def _source(text: str, wanted: Read) -> _Source | None:
    """What is to be done first for images or weight files that are no artifact; None for everything else."""
    path = Path(text)
    word, _, split = text.partition(":")
    if "image-set" in wanted.kinds and word == "digits":
        return _indexing({"kind": "digits", "split": split or "all"}, {})
    if "image-set" in wanted.kinds and path.is_dir() and not (path / MANIFEST).exists():
        return _indexing({"kind": "folder"}, {"images": path})
    if {"tokenizer", "generator"} & set(wanted.kinds) and path.suffix in SUFFIXES and path.is_file():
        return _Source(stages()["import-weights"], config_of(path), {"weights": path})
    return None


def _indexing(source: dict[str, Any], paths: dict[str, Path]) -> _Source:
    index = stages()["index"]
    return _Source(index, parse_config(index.config, {"source": source}, where=index.name), paths)


class _Unmade(Exception):
    """Data that would be put into the store first."""


def _say_plan(declared: Stage, config: BaseModel, values: dict[str, Any], paths: dict[str, Path], store: Store) -> None:
    """What would be done; nothing is written."""

    def find(text: str, wanted: Read) -> Artifact:
        source = _source(text, wanted)
        if source is None:
            return store.find(text)
        request = make_request(source.stage, source.config, Inputs({}), source.paths)
        if not store.is_current(request):
            raise _Unmade(text)
        return store.open(request.stage, request.key)

    found: dict[str, Any] = {"stage": declared.name, "key": None, "state": "run"}
    try:
        request = make_request(declared, config, Inputs(_find_inputs(declared, values, find)), paths)
        state = "done" if store.is_current(request) else "run"
        found = {"stage": declared.name, "key": request.key, "state": state}
        sentence = f"{declared.name}/{request.key}: {'is there already' if state == 'done' else 'would be made'}"
    except _Unmade as unmade:
        sentence = f"{declared.name}: {unmade} would be put into the store, then this would be made"
    if values["json"]:
        print_json(found)
    else:
        typer.echo(sentence)


def _show(made: Made, as_json: bool, quiet: bool) -> None:
    artifact = made.artifact
    if as_json:
        facts = {"stage": artifact.stage, "kind": artifact.kind, "key": artifact.key, "path": str(artifact.path)}
        print_json({**facts, "reused": made.reused, "facts": artifact.facts})
        return
    typer.echo(str(artifact.path))
    say(f"{'is there already' if made.reused else 'made'}: {artifact.facts.get('figure', artifact.name)}", quiet=quiet)


def _inputs(declared: Stage) -> list[inspect.Parameter]:
    parameters = []
    for name, item in declared.reads.items():
        kinds = " or ".join(item.kinds)
        text = f"{item.help or 'Input'} ({kinds}: ref, key or path{'; repeatable' if item.many else ''})"
        kind: Any = list[str] | None if item.many else str | None
        parameters.append(_parameter(_variable(name), kind, text, flag=_flag(name)))
    return parameters


def _externals(declared: Stage) -> list[inspect.Parameter]:
    return [
        _parameter(_variable(name), Path | None, item.help, flag=_flag(name))
        for name, item in declared.externals.items()
    ]


def _fields(declared: Stage) -> list[inspect.Parameter]:
    taken = {*declared.reads, *declared.externals, *COMMON, "set", "config", "ref"}
    return [
        _parameter(
            _argument(name), str | None if kind is list else kind | None, _field_help(field), flag=_switch(name, kind)
        )
        for name, kind, field in _simple_fields(declared.config)
        if name not in taken
    ]


def _simple_fields(config: type[BaseModel], place: str = "") -> list[tuple[str, Any, FieldInfo]]:
    """(dotted name, type, field) of every number, word, switch or list of these, in configs inside the config too."""
    found: list[tuple[str, Any, FieldInfo]] = []
    for name, field in config.model_fields.items():
        kind = _plain_kind(field.annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += _simple_fields(kind, f"{place}{name}.")
        elif kind is not None:
            found.append((f"{place}{name}", kind, field))
    return found


def _common() -> list[inspect.Parameter]:
    own = {
        "set": (SetOption, None),
        "config": (Annotated[str | None, typer.Option(help="YAML file of settings, or RECIPE.yaml:step.")], None),
        "ref": (Annotated[str | None, typer.Option(help="Name to give to the result, such as my/codebook.")], None),
    }
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in {**own, **COMMON}.items()
    ]


def _parameter(name: str, kind: Any, text: str, *, flag: str) -> inspect.Parameter:
    annotation = Annotated[kind, typer.Option(f"--{flag}", help=text, show_default=False)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _plain_kind(annotation: Any) -> Any:
    """int, float, str, bool, list (of these) or a config class; None for unions and everything else."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        kinds = [item for item in parts if item is not type(None)]
        return _plain_kind(kinds[0]) if len(kinds) == 1 else None
    if origin is Literal:
        return type(parts[0])
    if origin in (tuple, list):
        return list if parts and parts[0] in SCALARS else None
    return (
        annotation
        if annotation in SCALARS or (isinstance(annotation, type) and issubclass(annotation, BaseModel))
        else None
    )


def _argument(name: str) -> str:
    return "field_" + name.replace(".", "__")


def _field_help(field: FieldInfo) -> str:
    default = "" if field.is_required() else f" [default: {field.get_default(call_default_factory=True)}]"
    choices = f" ({', '.join(map(str, get_args(field.annotation)))})" if get_origin(field.annotation) is Literal else ""
    return f"{field.description or ''}{choices}{default}"


def _variable(name: str) -> str:
    return name.replace("-", "_")


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _switch(name: str, kind: Any) -> str:
    """A switch that is on by default needs a way to turn it off."""
    return f"{_flag(name)}/--no-{_flag(name)}" if kind is bool else _flag(name)
