"""`smalti config STAGE`: every setting of a stage as YAML for `--config`, with descriptions in comments."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from cli import options
from cli.output import guarded, plain_yaml, print_json
from cli.single import config_values
from pipeline.config import KIND, check_names, parse_config, unknown_key
from pipeline.errors import UsageError
from pipeline.settings import REQUIRED, Setting
from pipeline.stage import Stage
from stages import stages

WIDTH = 80


@guarded
def config(
    stage: Annotated[str, typer.Argument(help="A stage, such as train-tokenizer.")],
    set: options.SetOption = None,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
) -> None:
    """Print every setting of a stage: its name, its default, its type and its description.

    The output is a file for --config. With --set, the settings are those that follow from it, for example of another kind.

    Example: smalti config train-tokenizer --set views.kind=ten-crop > my-tokenizer.yaml
    """
    if stage not in stages():
        raise UsageError(unknown_key(stage, "the stages", list(stages())))
    declared = stages()[stage]
    given = config_values(declared, {"config": config, "set": set})
    settings = declared.settings(_whole(declared, given))
    if json:
        print_json({"stage": stage, "settings": [_as_json(setting) for setting in settings]})
    else:
        typer.echo(document(declared, settings), nl=False)


def document(declared: Stage, settings: Sequence[Setting]) -> str:
    """The settings as YAML. Required settings, and those of optional parts, are in comments."""
    first = inspect.cleandoc(declared.help).split("\n")[0]
    about = [f"{declared.name}: {first}", f"Edit, then: smalti {declared.name} --config FILE"]
    head = "".join(f"# {line}\n" for text in about for line in textwrap.wrap(text, WIDTH - 2))
    unsaid = {setting.name.rpartition(".")[0] for setting in settings if setting.is_for_digits}
    return head + "".join(_entry(setting, unsaid) for setting in settings)


def _entry(setting: Setting, unsaid: set[str]) -> str:
    """One setting: its description in comments, then its value.

    unsaid: parts with a setting in a comment; their kind is in a comment too, since naming it resets the part.
    """
    place = setting.name.rpartition(".")[0]
    is_left_out = setting.value is REQUIRED or setting.is_for_digits or (setting.key == KIND and place in unsaid)
    indent = "  " * setting.name.count(".")
    if setting.within:
        indent = f"# {indent}"
    about = textwrap.wrap(_about(setting), WIDTH - len(indent) - 2)
    line = f"{setting.key}:{_value(setting)}"
    blank = "" if setting.within or "." in setting.name else "\n"
    return blank + "".join(
        f"{indent}{text}\n" for text in [*(f"# {text}" for text in about), "# " * is_left_out + line]
    )


def _about(setting: Setting) -> str:
    notes = [setting.type] if not setting.parts else []
    if setting.value is REQUIRED:
        notes.append("needed")
    if setting.is_for_digits:
        notes.append("this value is for the digits, required for other images")
    if setting.parts and not isinstance(setting.value, Mapping):
        notes.append(f"or the settings below{', by kind' if len(setting.parts) > 1 else ''}")
    return setting.text + (f" ({'; '.join(notes)})" if notes else "")


def _value(setting: Setting) -> str:
    if setting.value is REQUIRED or (setting.parts and isinstance(setting.value, Mapping)):
        return ""
    text = plain_yaml(setting.value, in_one_line=True)
    return " " + text.removesuffix("...\n").strip()


def _whole(declared: Stage, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The given settings; if they are complete, with implied values (such as the numbers of a size)."""
    check_names(declared.config, given, where=declared.name)
    try:
        parsed = parse_config(declared.config, given, where=declared.name).model_dump(mode="json")
    except UsageError:  # a required setting is missing: it is printed as such
        return given
    return {name: parsed[name] for name in given}


def _as_json(setting: Setting) -> dict[str, Any]:
    is_needed = setting.value is REQUIRED
    return {
        "name": setting.name,
        "default": None if is_needed else setting.value,
        "needed": is_needed,
        "only_for_digits": setting.is_for_digits,
        "with": setting.within or None,
        "type": setting.type,
        "choices": list(setting.choices),
        "help": setting.text,
    }
