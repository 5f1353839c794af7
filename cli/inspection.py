"""`smalti status`, `verify` and `gc`: what is in a store, whether it is whole, and what nobody needs any more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli import options
from cli.output import guarded, print_json, print_table, readable_bytes, say
from pipeline.artifact import read_manifest, verify_artifact
from pipeline.errors import CorruptError, InputError, SmaltiError
from pipeline.runlog import total_seconds
from pipeline.store import Store


@guarded
def status(
    kind: Annotated[str | None, typer.Option(help="Only artifacts of this kind, such as token-set.")] = None,
    store: options.StoreOption = options.DEFAULT_STORE,
    json: options.JsonOption = False,
) -> None:
    """List what a store holds: artifacts, the refs that name them, and drafts of interrupted runs.

    Example: smalti status --kind token-set
    """
    here = Store(store)
    names: dict[tuple[str, str], list[str]] = {}
    for ref, target in here.refs().items():
        names.setdefault(target, []).append(ref)
    rows = [_row(path, names.get((path.parent.name, path.name), [])) for path in here.artifacts()]
    rows = [row for row in rows if kind in (None, row["kind"])]
    drafts = here.drafts()
    if json:
        print_json({"store": str(store), "artifacts": rows, "drafts": [str(path) for path in drafts]})
        return
    columns = ["kind", "artifact", "bytes", "seconds", "refs", "figure"]
    print_table(str(store), columns, [[_text(row, column) for column in columns] for row in rows])
    for path in drafts:
        typer.echo(
            f"draft\t{path.parent.name}/{path.name.removeprefix('.')[:12]}\tcontinues when it is asked for again"
        )
    say(f"{len(rows)} artifacts, {len(drafts)} drafts in {store}")


@guarded
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Refs, keys or paths; none: the whole store.")] = None,
    store: options.StoreOption = options.DEFAULT_STORE,
    json: options.JsonOption = False,
) -> None:
    """Hash every byte of artifacts and compare with their manifests.

    Example: smalti verify digits/rar/tokens
    """
    here = Store(store)
    if not names and not store.is_dir():
        raise InputError(f"there is no store at {store}", path=store, hint="give its folder with --store")
    paths = [here.locate(name) for name in names] if names else here.artifacts()
    failures: list[tuple[Path, SmaltiError]] = []
    for path in paths:
        try:
            artifact = verify_artifact(path)
            if not json:
                typer.echo(f"ok\t{artifact.name}\t{len(artifact.files)} files")
        except SmaltiError as error:
            failures.append((path, error))
            say(f"error: {error}", quiet=json)
    if json and not failures:
        print_json({"verified": len(paths)})
    if failures:
        first = failures[0][1]
        raise type(first)(
            f"{len(failures)} of {len(paths)} artifacts are damaged; the first: {first.message}",
            path=first.path,
            hint=first.hint,
        )
    say(f"{len(paths)} artifacts are whole", quiet=json)


@guarded
def path(
    name: Annotated[str, typer.Argument(help="Ref, key or its beginning.")],
    store: options.StoreOption = options.DEFAULT_STORE,
    json: options.JsonOption = False,
) -> None:
    """Print the folder of an artifact.

    Example: smalti path digits/rar/tokens
    """
    found = Store(store).locate(name).absolute()
    if json:
        print_json({"path": str(found)})
    else:
        typer.echo(str(found))


@guarded
def gc(
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed.")] = False,
    store: options.StoreOption = options.DEFAULT_STORE,
    json: options.JsonOption = False,
) -> None:
    """List artifacts and drafts that no ref reaches; with --yes, delete them.

    Example: smalti gc --yes
    """
    here = Store(store)
    garbage = here.garbage()
    if yes:
        here.sweep(garbage)
    total = sum(item.bytes for item in garbage)
    if json:
        rows = [{"path": str(item.path), "bytes": item.bytes} for item in garbage]
        print_json({"deleted": yes, "bytes": total, "garbage": rows})
        return
    for item in garbage:
        typer.echo(f"{readable_bytes(item.bytes)}\t{item.path}")
    advice = "" if yes or not garbage else "; delete them with --yes"
    say(f"{len(garbage)} folders, {readable_bytes(total)}{' deleted' if yes else ''}{advice}")


def _row(path: Path, refs: list[str]) -> dict[str, Any]:
    try:
        artifact = read_manifest(path)
    except CorruptError as error:
        name = f"{path.parent.name}/{path.name[:12]}"
        found = {"kind": "damaged", "artifact": name, "key": path.name, "bytes": 0, "seconds": 0.0}
        return {**found, "refs": refs, "figure": error.message}
    return {
        "kind": artifact.kind,
        "artifact": artifact.name,
        "key": artifact.key,
        "bytes": sum(entry.size for entry in artifact.files.values()),
        "seconds": round(total_seconds(artifact.path / "log"), 1),
        "refs": refs,
        "figure": artifact.figure,
    }


def _text(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if column == "bytes":
        return readable_bytes(value)
    return " ".join(value) if isinstance(value, list) else str(value)
