"""`smalti compare`: runs side by side, and the same table at the end of a recipe that has several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from cli import options
from cli.output import guarded, print_json, print_table, say
from pipeline.artifact import Artifact
from pipeline.errors import InputError, UsageError
from pipeline.store import Store
from smalti.counting import counted
from stages.scoring.runs import Row, find_runs, group, markdown, table


@guarded
def compare(
    names: Annotated[
        list[str],
        typer.Argument(help="Recipes that have run (<recipe> or <recipe>@<name>), scores of samples, or generators."),
    ],
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a table of Markdown.")] = False,
    store: options.StoreOption = options.DEFAULT_STORE,
    json: options.JsonOption = False,
) -> None:
    """Put runs side by side: tokenizer, generator, distance, consistency, parameters, images per second.

    Runs that differ in seeds alone are one row, with the median and the range of each figure. Images per second are those of
    the machine that drew the samples, as their logs say.

    Example: smalti compare digits/rar digits/rar@seed1
    """
    here = Store(store)
    rows = group(find_runs({ref: artifact for name in names for ref, artifact in _named(here, name).items()}, here))
    if json:
        print_json({"rows": [row.as_json() for row in rows]})
    elif as_markdown:
        typer.echo(markdown(*table(rows)), nl=False)
    else:
        print_rows(rows)
        runs = sum(len(row.runs) for row in rows)
        say(f"{counted(runs, 'run')} in {counted(len(rows), 'row')}")


def rows_of(made: Mapping[str, Artifact], store: Store) -> list[Row]:
    """Rows of the artifacts of a recipe; empty if there are fewer than two."""
    rows = group(find_runs(made, store))
    return rows if len(rows) > 1 else []


def print_rows(rows: Sequence[Row]) -> None:
    print_table("runs side by side", *table(rows))


def _named(store: Store, name: str) -> dict[str, Artifact]:
    """The artifacts of a name that can be compared: all steps of a recipe, or one artifact."""
    refs = [ref for ref in store.refs() if ref.rpartition("/")[0] == name]
    named = {ref: store.find(ref) for ref in refs} or {name: store.find(name)}
    if find_runs(named, store):
        return named
    if refs:
        raise InputError(f"the recipe {name} has no generator: there is nothing to compare")
    (artifact,) = named.values()
    raise UsageError(
        f"{name} is of kind {artifact.kind}, expected a recipe, a score of a generator's samples, or a generator"
    )
