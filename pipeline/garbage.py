"""Garbage collection: finds and removes folders of the store that are not reachable from a root.

Roots are the artifacts that refs name, running or resumable drafts, and recent folders; with a root its inputs are kept,
recursively. While garbage is removed, no other process can start to use an artifact.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pipeline import durable
from pipeline.artifact import LOG, MANIFEST
from pipeline.draft import JOURNAL, REPLACED, REQUEST, is_resumable
from pipeline.errors import Busy, CorruptError
from pipeline.locks import SUFFIX, Say, find_holder, lock, silent, steady
from pipeline.store import DAMAGE, DAMAGED, REFS, Store, named_key
from pipeline.trees import RECORDS
from smalti.json_files import parse_json

Name = tuple[str, str]
"""(stage, key)."""

KEY = re.compile(r"[0-9a-f]{64}")
NAMED, RUNNING, INTERRUPTED, YOUNG = "named", "running", "interrupted", "young"


@dataclass(frozen=True)
class Garbage:
    """A folder of the store that is not reachable, and its size in bytes."""

    path: Path
    bytes: int


@dataclass(frozen=True)
class Survey:
    """garbage: folders that can be removed.  kept: number of artifacts and drafts that are kept, by reason."""

    garbage: list[Garbage] = field(default_factory=list)
    kept: Mapping[str, int] = field(default_factory=dict)


def survey(store: Store, *, older_than: float = 0.0, drafts: bool = False) -> Survey:
    """Find garbage; removes nothing.

    older_than: folders that were made, continued or moved aside less than so many seconds ago are kept.  drafts: older
    interrupted ones are garbage, too. CorruptError where the inputs of an artifact cannot be determined.
    """
    roots = _roots(store, older_than=older_than, drafts=drafts)
    # A draft may be committed at this moment, so both folders are read.
    reads = cache(lambda name: [*_reads(store.partial(*name)), *_reads(store.path(*name))])
    reached = {reason: _closure(names, reads) for reason, names in roots.items()}
    garbage, kept = [], Counter[str]()
    for path in store.folders():
        if not KEY.fullmatch(named_key(path)[1]):
            continue  # not a folder of smalti
        reason = _reason_to_stay(path, store, roots, reached, older_than)
        if reason is None:
            garbage.append(Garbage(path, sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())))
        else:
            kept[reason] += 1
    return Survey(garbage, kept)


def sweep(store: Store, *, older_than: float = 0.0, drafts: bool = False, say: Say = silent) -> list[Garbage]:
    """Remove the garbage, each folder under its lock, and temporary files of killed processes; returns what was removed."""
    if not store.root.is_dir():
        return []
    with steady(store.root, alone=True, say=say):
        found = survey(store, older_than=older_than, drafts=drafts).garbage
        removed = [item for item in found if _remove(item.path)]
        for entry in store.entries():
            if entry.suffix == SUFFIX:
                with suppress(Busy), lock(entry, wait=False):
                    pass  # its holder has died: releasing removes it
        for folder in (REFS, RECORDS):
            for stray in (store.root / folder).rglob(f"*{durable.TEMPORARY}"):
                durable.remove(stray)
    return removed


def _roots(store: Store, *, older_than: float, drafts: bool) -> dict[str, set[Name]]:
    """Artifacts and drafts that are roots, by reason."""
    roots: dict[str, set[Name]] = {NAMED: set(store.refs().values()), RUNNING: set(), INTERRUPTED: set(), YOUNG: set()}
    for path in store.drafts():
        if find_holder(store.lock_path(*named_key(path))):
            roots[RUNNING].add(named_key(path))
        elif is_resumable(path) and not (drafts and _age(path) >= older_than):
            roots[INTERRUPTED].add(named_key(path))
        elif _age(path) < older_than:
            roots[YOUNG].add(named_key(path))
    roots[YOUNG] |= {named_key(path) for path in store.artifacts() if _age(path) < older_than}
    return roots


def _reason_to_stay(
    path: Path, store: Store, roots: Mapping[str, set[Name]], reached: Mapping[str, set[Name]], older_than: float
) -> str | None:
    name = named_key(path)
    if path.name.endswith(REPLACED) and store.has(*name):
        return None  # it was replaced by the artifact
    if DAMAGED in path.name:
        return YOUNG if _age(path) < older_than else None
    if path.name.endswith(durable.TEMPORARY):
        own = next((reason for reason, names in roots.items() if reason != NAMED and name in names), None)
        return own or (NAMED if not store.has(*name) and name in roots[NAMED] and is_resumable(path) else None)
    return next((reason for reason, names in reached.items() if name in names), None)


def _closure(names: Iterable[Name], reads: Callable[[Name], list[Name]]) -> set[Name]:
    """These and their inputs, recursively."""
    reached: set[Name] = set()
    todo = set(names)
    while todo:
        reached |= todo
        todo = {name for parent in todo for name in reads(parent)} - reached
    return reached


def _reads(path: Path) -> list[Name]:
    """The inputs of an artifact or a draft; CorruptError where they cannot be determined."""
    if not path.is_dir():
        return []
    is_draft = path.name.endswith(durable.TEMPORARY)
    note = path / (REQUEST if is_draft and not (path / MANIFEST).exists() else MANIFEST)
    if is_draft and not note.exists():
        return []  # just created, or by a version that did not record inputs in drafts
    try:
        records = parse_json(note.read_bytes(), note)["inputs"].values()
        items = [item for value in records for item in (value if isinstance(value, list) else [value])]
        return [(str(item["stage"]), str(item["key"])) for item in items]
    except (OSError, CorruptError, LookupError, TypeError, AttributeError) as error:
        if is_draft and not path.exists():
            return []  # it became an artifact
        raise CorruptError(
            f"the inputs of {path} cannot be determined: its {MANIFEST} is damaged or missing",
            path=path,
            hint="make it again with `smalti run`, or remove its folder; nothing was removed",
        ) from error


def _remove(path: Path) -> bool:
    """Remove a folder under its lock; False if another process holds it."""
    key = named_key(path)[1]
    removed = path.with_name(f".{key}{REPLACED}")  # renamed first: a reader never sees a part of it
    try:
        with lock(path.with_name(f"{key}{SUFFIX}"), wait=False):
            if path != removed:
                durable.remove(removed)
                durable.move(path, removed)
            durable.remove(removed)
    except Busy:
        return False
    return True


def _age(path: Path) -> float:
    """Seconds since an artifact was finished, a draft was continued, or something was moved aside."""
    marks = (path / MANIFEST, path / JOURNAL, path / REQUEST, path / LOG / DAMAGE, path / LOG / "metrics.jsonl")
    is_done = not path.name.startswith(".")
    times = [time_ for mark in (marks[:1] if is_done else marks) if (time_ := _modified(mark)) is not None]
    return time.time() - max(times or [_modified(path) or time.time()])


def _modified(path: Path) -> float | None:
    with suppress(OSError):  # missing, or just moved
        return path.stat().st_mtime
    return None
