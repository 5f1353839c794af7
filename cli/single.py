"""A typer command for every stage, generated from its declaration: `smalti kmeans --features digits/rar/features`.

Inputs are refs, keys, their beginnings, paths of artifacts, or data that `cli.sources` imports. Simple config fields have
their own options, others are set with --set.
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel

from cli.options import COMMON, ConfigOption, SetOption, running
from cli.output import guarded, pictures_of, plain_yaml, print_json, say
from cli.sources import Found, Unmade, bring, describe_images, find_current, find_made
from pipeline import ranks
from pipeline.artifact import Artifact
from pipeline.compatibility import settle
from pipeline.config import KIND, parse_config
from pipeline.draft import Request
from pipeline.errors import CorruptError, InputError, UsageError
from pipeline.externals import DigestUnknown, Need, absent_sentences, needs
from pipeline.recipe import parse_setting, put_setting
from pipeline.recipe_text import parse_yaml, read_written
from pipeline.runner import Made, Options, make, make_request
from pipeline.settings import REQUIRED, Setting, value_at
from pipeline.stage import Inputs, Read, Stage, check_kinds, imply
from pipeline.store import Store
from pipeline.trees import Memory
from stages import stages
from stages.codes.classes import numbers_of
from stages.images.checks import IMAGES, check_sizes, check_unmade_sizes

SCALARS = (int, float, str, bool)
AUTO = "auto"
STATES = {
    "done": "exists already",
    "run": "would be made",
    "damaged": "is damaged: it would be moved aside and made again",
}
ALL = "All settings as a file for --config: smalti config {}"

Values = dict[str, Any]
"""Values of the parameters, by name."""
Run = Callable[[Stage, Values], None]


def stage_command(
    declared: Stage, *, run: Run | None = None, more: Sequence[inspect.Parameter] = ()
) -> Callable[..., None]:
    """The command function of one stage, with a signature that typer turns into options.

    run: default `run_stage`.  more: options besides those of the declaration.
    """

    def command(**values: Any) -> None:
        (run or run_stage)(declared, values)

    parameters = [*_inputs(declared), *_externals(declared), *_fields(declared), *more, *_common()]
    command.__name__ = declared.name.replace("-", "_")
    command.__doc__ = f"{inspect.cleandoc(declared.help)}\n\n{ALL.format(declared.name)}\n\nExample: {declared.example}"
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return guarded(command)


def run_stage(declared: Stage, values: Values) -> None:
    """Make the artifact, and print its path."""
    settings = config_values(declared, values)
    paths = check_asked(declared, settings, values)
    store = Store(values["store"])
    if values["dry_run"]:
        show_plan(declared, settings, values, paths, store)
        return
    with running(values) as options:
        made = make_stage(declared, settings, values, paths, store, options)
    _show(made, values["json"], values["quiet"])


def check_asked(declared: Stage, settings: Mapping[str, Any], values: Values) -> dict[str, Path]:
    """External data by name; UsageError for invalid settings, before any work."""
    config = parse_config(declared.config, _without(settings, _waiting(declared, settings)), where=declared.name)
    given = {name: values.get(_variable(name)) for name in declared.externals}
    paths = {name: path for name, path in given.items() if path is not None}
    for name, external in declared.externals.items():
        if name not in paths and external.needed(config):
            raise UsageError(f"{declared.name} lacks --{_flag(name)}: {external.help}")
    if values["ref"]:
        Store(values["store"]).ref_path(values["ref"])  # UsageError for an invalid name
    return paths


def make_stage(
    declared: Stage, settings: Mapping[str, Any], values: Values, paths: dict[str, Path], store: Store, options: Options
) -> Made:
    """The artifact of one stage; inputs that are not artifacts are imported first."""
    found = _find_inputs(declared, values, lambda text, wanted, flag: bring(text, wanted, store, options, flag=flag))

    def take(first: Stage, config: BaseModel, inputs: Inputs) -> Artifact:
        return make(store, first, config, inputs, {}, options).artifact

    inputs = describe_images(declared, found, store, take)
    config = _settle(declared, settings, inputs, values, options.progress.say)
    return make(store, declared, config, inputs, paths, replace(options, ref=values["ref"] or ""))


def _settle(
    declared: Stage, settings: Mapping[str, Any], inputs: Inputs, values: Values, say_so: Callable[[str], None]
) -> BaseModel:
    """The config, with the numbers of named classes, and a proposed number for every `auto`."""
    check_kinds(declared, inputs)
    check_sizes(declared, settings, inputs)
    waiting = _waiting(declared, settings)
    settled = _without(settings, waiting)
    for name in sorted(waiting.keys() & declared.names.keys()):
        numbers = numbers_of(waiting[name], declared.names[name](inputs), where=f"--{_flag(name)}")
        put_setting(settled, name.split("."), numbers)
    config = parse_config(declared.config, settled, where=declared.name)
    processes = max(1, values["workers"]) + ranks.local_world_size() - 1
    for name in sorted(waiting.keys() & declared.proposes.keys()):
        proposal = declared.proposes[name](config, inputs, values["device"], processes)
        say_so(f"  --{_flag(name)} {proposal.value}: {proposal.reason}")
        settled[name] = proposal.value
    return settle(declared, parse_config(declared.config, settled, where=declared.name), inputs)


def _waiting(declared: Stage, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are replaced by numbers when the inputs are known: `auto`, and names of classes."""
    autos = {name: settings[name] for name in declared.proposes if settings.get(name) == AUTO}
    listed = {name: value_at(settings, name) for name in declared.names}
    named = {name: value for name, value in listed.items() if isinstance(value, list) and _holds_words(value)}
    return autos | named


def _holds_words(values: list[Any]) -> bool:
    return any(isinstance(value, str) for value in values)


def _without(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A copy of settings without some dotted names."""
    copy = deepcopy(dict(settings))
    for name in names:
        place, _, key = name.rpartition(".")
        del (value_at(copy, place) if place else copy)[key]
    return copy


def config_values(declared: Stage, values: Values) -> dict[str, Any]:
    """Config as plain values: implied by external data, from the file of --config, then the options, then --set."""
    found: dict[str, Any] = _read_config(values["config"], declared) if values["config"] else {}
    for setting, kind in optional_settings(declared):
        given = values.get(_argument(setting.name))
        if given is not None:
            put_setting(found, setting.name.split("."), _parse_value(declared, setting, kind, given))
    for text in values["set"] or []:
        keys, value = parse_setting(text)
        put_setting(found, keys, value)
    return imply(declared, found, [name for name in declared.externals if values.get(_variable(name)) is not None])


def _parse_value(declared: Stage, setting: Setting, kind: Any, given: Any) -> Any:
    """The value of an option; typer has parsed numbers, words and switches, but neither lists nor options with `auto`."""
    try:
        if kind is list:
            return list(parse_yaml(f"[{given}]"))
        return parse_yaml(given) if _may_be_auto(declared, setting) else given
    except ValueError as error:
        wanted = "values separated by commas" if kind is list else f"a number or {AUTO}"
        raise UsageError(f"--{_flag(setting.name)} {given!r}: expected {wanted}") from error


def _read_config(text: str, declared: Stage) -> dict[str, Any]:
    """Settings from a YAML file, or from one step of a recipe: FILE.yaml or RECIPE.yaml:step."""
    name, _, step = text.partition(":")
    try:
        if step:
            document = read_written(Path(name), stages()).values["steps"][step].get("config", {})
        else:
            document = parse_yaml(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {name} cannot be read: {error.strerror}", path=name) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--config {text} holds no settings of {declared.name}") from error
    if not isinstance(document, dict):
        raise UsageError(f"--config {text} is not a mapping")
    return document


def _find_inputs(declared: Stage, values: dict[str, Any], find: Callable[[str, Read, str], Artifact]) -> Found:
    found: Found = {}
    for name, wanted in declared.reads.items():
        given = values.get(_variable(name))
        if not given:
            if not wanted.optional:
                raise UsageError(
                    f"{declared.name} lacks --{_flag(name)}: {wanted.help or 'a ' + ' or '.join(wanted.kinds)}"
                )
            continue
        items = [find(text, wanted, _flag(name)) for text in (given if isinstance(given, list) else [given])]
        found[name] = items if wanted.many else items[0]
    return found


def show_plan(
    declared: Stage, settings: Mapping[str, Any], values: Values, paths: dict[str, Path], store: Store
) -> None:
    """Print what would be done, and the config as YAML for --config; nothing is made."""
    found: dict[str, Any] = {"stage": declared.name, "key": None, "state": "run"}
    absent: list[Need] = []
    memory = Memory(store.root, rescan=values["rescan"])
    try:
        made = _find_inputs(declared, values, lambda text, wanted, flag: find_made(text, wanted, store, memory))

        def find(first: Stage, config: BaseModel, inputs: Inputs) -> Artifact:
            name = inputs["images"].name
            return find_current(make_request(first, config, inputs, {}), store, name, f"{name} would be described")

        inputs = describe_images(declared, made, store, find)
        config = _settle(declared, settings, inputs, values, lambda text: say(text, quiet=values["quiet"]))
        absent = [need for need in needs(declared, config, paths) if need.place.find() is None]
        request = make_request(declared, config, inputs, paths, memory=memory)
        state = _state(request, store, is_forced=values["force"])
        found |= {"key": request.key, "state": state, "config": config.model_dump(mode="json")}
        absent = [] if state == "done" else absent
        sentence = f"{declared.name}/{request.key}: {STATES[state]}"
    except Unmade as unmade:
        if str(unmade) == values.get(IMAGES):
            check_unmade_sizes(declared, settings, str(unmade))
        found["config"] = _unsettled(declared, settings)
        sentence = f"{declared.name}: {unmade.how}, then this would be made"
    except DigestUnknown as unknown:
        found["config"] = config.model_dump(mode="json")
        sentence = f"{declared.name}: {unknown}, then this would be made"
    if values["json"]:
        print_json(found | {"absent": [need.as_json() for need in absent]})
        return
    typer.echo(f"# {sentence}\n{plain_yaml(found['config'])}", nl=False)
    for said in absent_sentences(absent):
        say(said, quiet=values["quiet"])


def _state(request: Request, store: Store, *, is_forced: bool) -> str:
    if isinstance(store.look(request.stage, request.key), CorruptError):
        return "damaged"
    return "done" if store.is_current(request) and not is_forced else "run"


def _unsettled(declared: Stage, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The config as plain values, with `auto` and names of classes as given."""
    waiting = _waiting(declared, settings)
    config = parse_config(declared.config, _without(settings, waiting), where=declared.name).model_dump(mode="json")
    for name, words in waiting.items():
        put_setting(config, name.split("."), words)
    return config


def _show(made: Made, as_json: bool, quiet: bool) -> None:
    artifact = made.artifact
    pictures = pictures_of(artifact)
    if as_json:
        facts = {"stage": artifact.stage, "kind": artifact.kind, "key": artifact.key, "path": str(artifact.path)}
        print_json(
            {**facts, "reused": made.reused, "facts": artifact.facts, "figure": artifact.figure, "pictures": pictures}
        )
        return
    typer.echo(str(artifact.path))
    for name, path in pictures.items():
        typer.echo(f"{name}: {path}")
    say(f"{'exists already' if made.reused else 'made'}: {artifact.figure or artifact.name}", quiet=quiet)


def _inputs(declared: Stage) -> list[inspect.Parameter]:
    parameters = []
    for name, item in declared.reads.items():
        kinds = " or ".join(item.kinds)
        text = f"{item.help or 'Input'} ({kinds}: ref, key or path{'; repeatable' if item.many else ''})"
        kind: Any = list[str] | None if item.many else str | None
        parameters.append(parameter(_variable(name), kind, text, flag=_flag(name)))
    return parameters


def _externals(declared: Stage) -> list[inspect.Parameter]:
    return [
        parameter(_variable(name), Path | None, item.help, flag=_flag(name))
        for name, item in declared.externals.items()
    ]


def _fields(declared: Stage) -> list[inspect.Parameter]:
    taken = {*declared.reads, *declared.externals, *COMMON, "set", "config", "ref"}
    found: dict[str, inspect.Parameter] = {}
    texts: dict[str, str] = {}
    for setting, kind in optional_settings(declared):
        name = setting.name
        if name in taken:
            continue
        texts[name] = f"{texts[name]}; {help_of(setting)}" if name in texts else help_of(setting)
        text = texts[name] + (f"; {AUTO}: a value for this machine" if name in declared.proposes else "")
        text += "; numbers, or names where the classes have them" if name in declared.names else ""
        known = str if kind is list or _may_be_auto(declared, setting) else kind
        found[name] = parameter(_argument(name), known | None, text, flag=_switch(name, kind))
    return list(found.values())


def optional_settings(declared: Stage) -> list[tuple[Setting, Any]]:
    """(setting, type) of every setting that can be an option: a number, word, switch or list of these with a choice.

    A setting that differs by kind occurs once for each.
    """
    settings = declared.settings(all_kinds=True)
    settings = [setting for setting in settings if not (setting.key == KIND and len(setting.choices) == 1)]
    kinds = [(setting, _plain_kind(setting.field.annotation)) for setting in settings]
    return [(setting, kind) for setting, kind in kinds if kind is not None]


def _common() -> list[inspect.Parameter]:
    own = {
        "set": (SetOption, None),
        "config": (ConfigOption, None),
        "ref": (Annotated[str | None, typer.Option(help="Name to give to the result, such as my/codebook.")], None),
    }
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in {**own, **COMMON}.items()
    ]


def parameter(name: str, kind: Any, text: str, *, flag: str) -> inspect.Parameter:
    annotation = Annotated[kind, typer.Option(f"--{flag}", help=text, show_default=False)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _plain_kind(annotation: Any) -> Any:
    """int, float, str, bool or list (of these); None for configs, unions and everything else."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        kinds = [item for item in parts if item is not type(None) and not _is_auto(item)]
        return _plain_kind(_item_kind(kinds[0])) if len(kinds) == 1 else None
    if origin is Literal:
        return type(parts[0])
    if origin in (tuple, list):
        return list if parts and _item_kind(parts[0]) in SCALARS else None
    return annotation if annotation in SCALARS else None


def _may_be_auto(declared: Stage, setting: Setting) -> bool:
    return setting.name in declared.proposes or any(map(_is_auto, get_args(setting.field.annotation)))


def _is_auto(annotation: Any) -> bool:
    return get_origin(annotation) is Literal and get_args(annotation) == (AUTO,)


def _item_kind(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _argument(name: str) -> str:
    return "field_" + name.replace(".", "__")


def help_of(setting: Setting) -> str:
    """Description, choices and default of a setting, for the help of its option."""
    choices = f" ({', '.join(map(str, setting.choices))})" if len(setting.choices) > 1 else ""
    return f"{setting.text}{choices} [{default_of(setting)}]"


def default_of(setting: Setting) -> str:
    """The default in words, or "needed"."""
    kind = f"kind {' or '.join(setting.kinds)}" if setting.kinds else ""
    within = (
        "" if kind and setting.within == setting.name.rpartition(".")[0] else setting.within
    )  # its kind asks for it
    part = f" with {' and '.join(filter(None, [within, kind]))}" if within or kind else ""
    if setting.value is REQUIRED:
        return f"needed{part}"
    value = ", ".join(map(str, setting.value)) if isinstance(setting.value, list) else json.dumps(setting.value)
    value = value.strip('"') or "empty"
    if setting.is_for_digits:
        return f"default for the digits: {value}; needed for other images"
    return f"default{part}: {value}"


def _variable(name: str) -> str:
    return name.replace("-", "_")


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _switch(name: str, kind: Any) -> str:
    """The names of an option; a switch also has one to turn it off."""
    return f"{_flag(name)}/--no-{_flag(name)}" if kind is bool else _flag(name)
