"""Sharded work: numbered, idempotent shards mapped over a cluster, each recorded in the draft's journal.

A shard function computes files from (spec, shard number) alone, so that a retried or resumed shard gives the same bytes
on any worker. The worker writes them into the draft folder; this process records them in the journal once it sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from copy import copy
from functools import partial
from pathlib import Path
from typing import TypeVar

from pipeline import durable, shared_folder
from pipeline.artifact import FileEntry
from pipeline.cluster import Failure
from pipeline.draft import Draft, write_files
from pipeline.errors import SmaltiError, StorageError
from pipeline.runtime import Runtime

TRACEBACK = "traceback.txt"

Spec = TypeVar("Spec")
ShardFunction = Callable[[Spec, int], Mapping[str, bytes]]


def map_shards(
    out: Draft,
    run: Runtime,
    function: ShardFunction[Spec],
    spec: Spec,
    sizes: list[int],
    *,
    label: str,
    unit: str = "images",
) -> None:
    """Compute every shard that is not in the draft yet.

    function: module-level function (spec, number) -> {file name: bytes}; `spec` must be picklable.
    sizes: `unit`s per shard, for the progress bar.  A shard that fails by its data, by I/O or by dying workers does not
    stop the others; at the end one error, of the class of the first, names the failed shards. Other errors stop at once.
    Tracebacks go to log/traceback.txt.
    """
    pending = [number for number in range(len(sizes)) if not out.is_done(unit_name(number))]
    failures: dict[int, SmaltiError] = {}
    compute = partial(_compute, function, spec, out.path)
    with (
        run.progress.bar(label, total=sum(sizes), unit=unit) as bar,
        closing(run.cluster.map(compute, pending, folder=out.path, say=run.progress.say)) as outcomes,
    ):
        bar.skip(sum(sizes) - sum(sizes[number] for number in pending))
        for number, outcome in outcomes:
            if isinstance(outcome, Failure):
                failures[number] = log_failure(run.log / TRACEBACK, label, number, outcome)
                if outcome.verdict == "stop":
                    raise_failures({number: failures[number]}, len(sizes))
            else:
                check_seen(out.path, outcome)
                out.record(unit_name(number), outcome)
                bar.advance(sizes[number])
    if failures:
        raise_failures(failures, len(sizes))


def unit_name(number: int) -> str:
    return f"shard-{number:06d}"


def check_seen(root: Path, entries: list[FileEntry]) -> None:
    """StorageError unless this process sees every file with its size (a network file system may take a moment)."""
    for entry in entries:
        path = root / entry.path
        if not shared_folder.becomes_true(partial(_has_size, path, entry.size), shared_folder.SEEN_SECONDS):
            raise StorageError(
                f"a worker wrote {path} of {entry.size} bytes, but this process does not see it", path=path
            )


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def log_failure(log: Path, label: str, number: int, failure: Failure) -> SmaltiError:
    """The error of a failed shard; a traceback is appended to `log`, which the error names."""
    if not failure.traceback:
        return failure.error
    with durable.refusals(log), log.open("a") as file:
        file.write(f"{label}, shard {number}\n{failure.traceback}\n")
    return type(failure.error)(failure.error.message, path=log, hint=f"the traceback is in {log}")


def raise_failures(failures: Mapping[int, SmaltiError], shards: int) -> None:
    """One sentence for all failed shards; the exit code is that of the lowest-numbered one."""
    numbers = sorted(failures)
    first = failures[numbers[0]]
    named = ", ".join(str(number) for number in numbers[:10]) + (", ..." if len(numbers) > 10 else "")
    failure = copy(first)  # constructors of some classes take other arguments
    shard = "shard" if len(numbers) == 1 else "shards"
    failure.message = f"{shard} {named} of {shards} failed, finished shards are kept: {first.message}"
    raise failure from first


def _compute(function: ShardFunction[Spec], spec: Spec, root: Path, number: int) -> list[FileEntry]:
    return write_files(root, function(spec, number))
