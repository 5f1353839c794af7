"""The command `smalti`: one command per stage, and commands on recipes and stores. Thin: text in, stage call out."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import Any

import typer

from cli import doctor, inspection, recipes, settings
from cli.output import print_error
from cli.pictures import generate_command, sample_command
from cli.single import stage_command
from pipeline import ranks
from pipeline.errors import UsageError
from smalti import __version__
from stages import stages

CommandLineError: Any = typer.BadParameter.__mro__[2]  # typer exports no base class of its complaints

app = typer.Typer(
    name="smalti",
    help="From images to codes, from codes to a reusable dataset, to generators, and back to images with a score.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)


@app.callback()
def about(
    version: bool = typer.Option(
        False,
        "--version",
        help="Print the version and leave.",
        is_eager=True,
        callback=lambda value: _print_version(value),
    ),
) -> None:
    pass


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


STORES = "Recipes and stores"
app.command("run", cls=recipes.RunCommand, rich_help_panel=STORES)(recipes.run)
for command in (
    recipes.plan,
    recipes.schema,
    settings.config,
    inspection.status,
    inspection.path,
    inspection.verify,
    inspection.gc,
    doctor.doctor,
):
    app.command(rich_help_panel=STORES)(command)
for name, declared in stages().items():
    if name == "sample":
        command = sample_command(declared, stages()["decode"])
    else:
        command = generate_command(declared) if name == "generate" else stage_command(declared)
    app.command(name, short_help=inspect.cleandoc(declared.help).split("\n")[0], rich_help_panel="Stages")(command)


def main() -> None:
    """Entry point of the console script. With --json a wrong option is answered by an object too.

    Under torchrun only the first process prints results.
    """
    if not ranks.is_first():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    if "--json" not in sys.argv:
        app()
    try:
        sys.exit(app(standalone_mode=False))
    except CommandLineError as error:
        print_error(UsageError(error.format_message(), hint="see --help"), UsageError.exit_code, as_json=True)
        sys.exit(UsageError.exit_code)
