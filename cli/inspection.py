"""`smalti status`, `path`, `verify` and `gc`: contents of a store, their verification, and garbage collection."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import filesize

from cli import options
from cli.output import guarded, print_json, print_table, say
from pipeline.artifact import LOG, read_manifest, verify_artifact
from pipeline.draft import is_resumable, read_note, read_units
from pipeline.errors import CorruptError, InputError, SmaltiError, UsageError
from pipeline.garbage import INTERRUPTED, NAMED, RUNNING, YOUNG, Garbage, survey, sweep
from pipeline.locks import SUFFIX, find_holder
from pipeline.outside_tokens import is_token_folder, verify_outside
from pipeline.runlog import last_step, read_attempts, total_seconds
from pipeline.store import DAMAGED, Store, named_key
from smalti.counting import counted

AGE = re.compile(r"(\d+(?:\.\d+)?)([smhdw]?)")
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@guarded
def status(
    kind: Annotated[str | None, typer.Option(help="Only artifacts of this kind, such as token-set.")] = None,
    store: options.StoreOption = options.DEFAULT_STORE,
    json: options.JsonOption = False,
) -> None:
    """List what a store holds: artifacts, the refs that name them, drafts that run or were interrupted, what was damaged.

    Example: smalti status --kind token-set
    """
    here = _existing(store)
    names: dict[tuple[str, str], list[str]] = {}
    for ref, target in here.refs().items():
        names.setdefault(target, []).append(ref)
    rows = [_row(path, names.get((path.parent.name, path.name), [])) for path in here.artifacts()]
    rows = [row for row in rows if kind in (None, row["kind"])]
    drafts = [_draft(path) for path in here.drafts()]
    damaged = [str(path) for path in here.folders() if DAMAGED in path.name]
    if json:
        print_json({"store": str(store), "artifacts": rows, "drafts": drafts, "damaged": damaged})
        return
    columns = ["kind", "artifact", "bytes", "seconds", "refs", "figure"]
    print_table(str(store), columns, [[_text(row, column) for column in columns] for row in rows])
    for draft in drafts:
        typer.echo(f"draft\t{draft['stage']}/{draft['key'][:12]}\t{_sentence(draft)}")
    for aside in damaged:
        typer.echo(f"damaged\t{aside}\tmoved aside; `smalti gc` removes it when it is old")
    say(f"{counted(len(rows), 'artifact')}, {counted(len(drafts), 'draft')} in {store}")


@guarded
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Refs, keys or paths; none: the whole store.")] = None,
    store: options.StoreOption = options.DEFAULT_STORE,
    json: options.JsonOption = False,
) -> None:
    """Hash every byte of artifacts and compare with their manifests.

    Example: smalti verify digits/rar/tokens
    """
    here = Store(store) if names else _existing(store)
    outside = [Path(name) for name in names or [] if is_token_folder(Path(name))]
    inside = [here.locate(name) for name in names or [] if Path(name) not in outside]
    paths = [*outside, *inside] if names else here.artifacts()
    failures: list[tuple[Path, SmaltiError]] = []
    for path in paths:
        try:
            artifact = verify_outside(path) if path in outside else verify_artifact(path)
            if not json:
                typer.echo(f"ok\t{artifact.name}\t{counted(len(artifact.files), 'file')}")
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
    say(f"{counted(len(paths), 'artifact')} {'is' if len(paths) == 1 else 'are'} whole", quiet=json)


@guarded
def path(
    name: Annotated[str, typer.Argument(help="Ref, key or its beginning.")],
    store: options.StoreOption = options.DEFAULT_STORE,
    json: options.JsonOption = False,
) -> None:
    """Print the folder of an artifact, or of its draft while it is made.

    Example: smalti path digits/rar/tokens
    """
    here = Store(store)
    drafts = here.find_drafts(name)
    try:
        artifact = here.locate(name)
        if not artifact.exists():
            raise InputError(
                f"{name} names {artifact}, which does not exist", path=artifact, hint="run its recipe again"
            )
        found = {"path": str(artifact), "state": "done"}
    except InputError:
        if len(drafts) != 1:
            raise
        found = _draft(drafts[0])
        say(f"{name} is a draft: {_sentence(found)}", quiet=json)
    if json:
        print_json(found)
    else:
        typer.echo(found["path"])


@guarded
def gc(
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed.")] = False,
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="AGE", help="Keep what is younger: 90s, 30m, 12h, 7d, 4w or 0.")
    ] = "7d",
    drafts: Annotated[
        bool, typer.Option("--drafts", help="Give up interrupted runs that are older, too: their drafts are listed.")
    ] = False,
    store: options.StoreOption = options.DEFAULT_STORE,
    json: options.JsonOption = False,
) -> None:
    """List what nothing needs any more; with --yes, delete it.

    What a ref names stays, a draft that is made or can be continued, what is younger than --older-than, and all that these
    were made from.

    Example: smalti gc --yes
    """
    seconds, here = parse_age(older_than), _existing(store)
    found = survey(here, older_than=seconds, drafts=drafts)
    removed = sweep(here, older_than=seconds, drafts=drafts, say=say) if yes else []
    if json:
        rows = {"garbage": [_item(item) for item in found.garbage], "removed": [_item(item) for item in removed]}
        print_json({"deleted": yes, "bytes": _total(removed if yes else found.garbage), **rows, "kept": found.kept})
        return
    for item in removed if yes else found.garbage:
        typer.echo(f"{filesize.decimal(item.bytes)}\t{item.path}")
    say(f"{_outcome(found.garbage, removed, yes)}; {_kept(found.kept, older_than)}")


def parse_age(text: str) -> float:
    """Seconds of an age such as `7d`."""
    found = AGE.fullmatch(text)
    if found is None or not (found[2] or float(found[1]) == 0):
        raise UsageError(f"--older-than {text!r}: expected a number and one of {', '.join(UNITS)}, such as 12h or 7d")
    return float(found[1]) * UNITS.get(found[2], 1)


def _outcome(garbage: list[Garbage], removed: list[Garbage], yes: bool) -> str:
    if not garbage:
        return "no garbage"
    if not yes:
        return f"{counted(len(garbage), 'folder')}, {filesize.decimal(_total(garbage))}: delete with --yes"
    left = "; others are in use now" if len(removed) < len(garbage) else ""
    return f"removed {counted(len(removed), 'folder')}, {filesize.decimal(_total(removed))}{left}"


def _kept(kept: Mapping[str, int], older_than: str) -> str:
    words = {NAMED: "named", RUNNING: "being made", INTERRUPTED: "interrupted", YOUNG: f"younger than {older_than}"}
    parts = ", ".join(f"{kept[reason]} {word}" for reason, word in words.items() if reason in kept)
    return f"kept, with what they were made from: {parts}" if parts else "nothing was kept"


def _item(item: Garbage) -> dict[str, Any]:
    return {"path": str(item.path), "bytes": item.bytes}


def _total(items: list[Garbage]) -> int:
    return sum(item.bytes for item in items)


def _draft(path: Path) -> dict[str, Any]:
    """The state of a draft. since: the start of the process that makes it, or that made it last."""
    stage, key = named_key(path)
    holder = find_holder(path.with_name(f"{key}{SUFFIX}"))
    last = (read_attempts(path / LOG / "run.json") or [{}])[-1]
    return {
        "path": str(path),
        "stage": stage,
        "key": key,
        "name": read_note(path).get("name", ""),
        "state": "running" if holder else "interrupted",
        "host": holder.host if holder else last.get("host"),
        "pid": holder.pid if holder else None,
        "since": holder.since if holder else str(last.get("started", "")).replace("T", " ")[:19],
        "units": len(read_units(path)),
        "is_saved": is_resumable(path),
        "step": last_step(path / LOG),
    }


def _sentence(draft: dict[str, Any]) -> str:
    name = f"{draft['name']} " if draft["name"] else ""
    units = f", {counted(draft['units'], 'unit')} done" if draft["units"] else ""
    step = "" if draft["step"] is None else f", training step {draft['step']}"
    if draft["state"] == "running":
        return f"{name}running on {draft['host']} since {draft['since']} (process {draft['pid']}){step}{units}"
    began = f" on {draft['host']}, where it began {draft['since']}" if draft["host"] else ""
    saved = "continues" if draft["is_saved"] else "nothing of it is saved, so it begins again"
    return f"{name}interrupted{began}{step}{units}; {saved} when it is asked for"


def _existing(store: Path) -> Store:
    """The store; InputError (exit code 3) where there is none."""
    if not store.is_dir():
        raise InputError(f"there is no store at {store}", path=store, hint="give its folder with --store")
    return Store(store)


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
        return filesize.decimal(value)
    return " ".join(value) if isinstance(value, list) else str(value)
