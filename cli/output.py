"""Output of commands: results on stdout, messages on stderr, one JSON object with --json, exit codes of errors."""

from __future__ import annotations

import errno
import functools
import json
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from ruamel.yaml import YAML

from pipeline.artifact import Artifact
from pipeline.durable import ONLY_WRITING, REFUSALS
from pipeline.errors import CannotWrite, MemoryExhausted, SmaltiError, StorageError
from pipeline.runtime import Terminated

CommandT = TypeVar("CommandT", bound=Callable[..., Any])
INTERRUPTED = "stopped; the same command continues from the last checkpoint"


def guarded(command: CommandT) -> CommandT:
    """Turn every error of a command into one sentence (or, with json=True, one object) and its exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        as_json = bool(kwargs.get("json", False))
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, _terminate)
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            fail(SmaltiError(INTERRUPTED), 130, as_json)
        except Terminated:
            fail(SmaltiError(INTERRUPTED), 143, as_json)
        except (BrokenPipeError, typer.Exit):  # `smalti status | head`: typer leaves quietly
            raise
        except Exception as error:
            explained = explain(error)
            fail(explained, explained.exit_code, as_json)

    return run  # type: ignore[return-value]


def explain(error: Exception) -> SmaltiError:
    """Any exception as one sentence with an exit code; of unexpected exceptions, the traceback is printed."""
    if isinstance(error, SmaltiError):
        return error
    if isinstance(error, MemoryError):
        return MemoryExhausted(f"this machine is out of memory {error}".strip())
    if isinstance(error, OSError):
        return _translate(error)
    traceback.print_exception(error)
    return SmaltiError(f"internal error: {type(error).__name__}: {error}", hint="please report it")


def fail(error: SmaltiError, code: int, as_json: bool) -> NoReturn:
    print_error(error, code, as_json=as_json)
    raise typer.Exit(code)


def print_error(error: SmaltiError, code: int, *, as_json: bool) -> None:
    if as_json:
        body = {"code": code, "message": error.message, "path": error.path, "hint": error.hint}
        typer.echo(json.dumps({"error": body}))
    else:
        typer.echo(f"{'error: ' if code < 128 else ''}{error}", err=True)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def plain_yaml(value: Any, *, in_one_line: bool = False) -> str:
    """Settings as YAML that `--config` reads."""
    yaml: Any = YAML(typ="safe", pure=True)  # Any: it declares its attributes as None
    text = StringIO()
    yaml.sort_base_mapping_type_on_output = False
    yaml.default_flow_style, yaml.width = (True, 10**6) if in_one_line else (None, 80)
    yaml.dump(value, text)
    return text.getvalue()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout: framed on a terminal, tab-separated plain text elsewhere.

    Lines break only between words, so that ids, refs and paths are not split. A table that is still too wide is printed row by row.
    """
    if not sys.stdout.isatty():
        for row in [columns, *rows]:
            typer.echo("\t".join(row))
        return
    console = Console()
    widths = fit([columns, *rows], console.width - 3 * len(columns) - 1)
    if widths is None:
        typer.echo("\n\n".join([title, *(_record(columns, row) for row in rows)]))
        return
    table = Table(title=title, title_justify="left")
    for column, width in zip(columns, widths, strict=True):
        table.add_column(column, width=width)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def fit(rows: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """Widths of the columns of a table that is `width` characters wide; None where its longest words do not fit."""
    columns = list(zip(*rows, strict=True))
    least = [max(len(word) for cell in column for word in ["", *cell.split()]) for column in columns]
    widths = [max(len(cell) for cell in column) for column in columns]
    if sum(least) > width:
        return None
    while sum(widths) > width:
        widest = max(range(len(widths)), key=lambda number: (widths[number] > least[number], widths[number]))
        widths[widest] -= 1
    return widths


def _record(columns: Sequence[str], row: Sequence[str]) -> str:
    return "\n".join(f"{column}: {cell}" for column, cell in zip(columns, row, strict=True) if cell)


def pictures_of(artifact: Artifact) -> dict[str, str]:
    """The pictures in an artifact: name -> path."""
    return {Path(name).stem: str(artifact.path / name) for name in artifact.files if name.endswith(".png")}


def say(text: str, *, quiet: bool = False) -> None:
    """Print a message to stderr."""
    if not quiet:
        typer.echo(text, err=True)


def _translate(error: OSError) -> SmaltiError:
    """An OSError outside of `pipeline.durable`, which handles writing: with a file name it is an error of reading."""
    if error.errno in ONLY_WRITING:
        return CannotWrite(f"cannot write {error.filename or 'a file'}: {REFUSALS[error.errno]}", path=error.filename)
    if error.filename is None:
        return StorageError(str(error.strerror or error))
    reason = "there is no such file" if error.errno == errno.ENOENT else REFUSALS.get(error.errno or 0, error.strerror)
    return StorageError(f"{error.filename} cannot be read: {reason}", path=error.filename)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated()
