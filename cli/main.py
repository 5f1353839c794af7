"""The command `smalti`: one command per stage, and commands on recipes and stores."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import typer

from cli import comparison, doctor, inspection, recipes, settings
from cli.options import followers
from cli.output import explain, guarded, print_error
from cli.pictures import generate_command, sample_command
from cli.single import stage_command
from pipeline import ranks
from pipeline.errors import UsageError
from pipeline.following import follow
from pipeline.launch import ARRIVAL_SECONDS
from smalti import __version__
from stages import stages

Result = TypeVar("Result")
HURRY_SECONDS = 5.0  # after an error, for processes of the launch that connect late
CommandLineError: Any = typer.BadParameter.__mro__[2]  # typer exports no base class of its errors

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
    comparison.compare,
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
    """Entry point of the console script. Of several processes of a launch only the first runs the command."""
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "passive"
    )  # read by OpenMP when torch loads it: idle threads free their core
    if ranks.is_first():
        lead()
    else:
        sys.exit(_ended_by(take_part))


def lead() -> None:
    """Run the command; the other processes of the launch, if any, exit when it ends."""
    others, patience = _ended_by(followers), HURRY_SECONDS
    try:
        run_app()
    except SystemExit as end:
        patience = HURRY_SECONDS if end.code else ARRIVAL_SECONDS
        raise
    finally:
        others.dismiss(patience=patience)


def run_app() -> None:
    """Run the typer app; with --json also errors of options are printed as an object."""
    if "--json" not in sys.argv:
        app()
    try:
        sys.exit(app(standalone_mode=False))
    except CommandLineError as error:
        print_error(UsageError(error.format_message(), hint="see --help"), UsageError.exit_code, as_json=True)
        sys.exit(UsageError.exit_code)


def take_part() -> int:
    """Execute the orders of process 0; returns the exit code. Errors are printed only if process 0 cannot."""
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    return follow(stages(), explain=explain, say=lambda error: print_error(error, error.exit_code, as_json=False))


def _ended_by(work: Callable[[], Result]) -> Result:
    """The result of `work`; its errors end the process like those of a command."""
    try:
        return guarded(work)()
    except typer.Exit as end:
        sys.exit(end.exit_code)
