"""Sharded work: numbered, idempotent shards mapped over a cluster, each recorded in the draft's journal.

A shard function computes files from (spec, shard number) alone, so that a retried, moved or resumed shard gives the same
bytes. The worker writes them into the draft folder; only this process writes the journal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from pathlib import Path
from typing import TypeVar

from pipeline.artifact import FileEntry
from pipeline.draft import Draft, write_files
from pipeline.errors import CannotWrite, MemoryExhausted, SmaltiError, StorageError, WorkerError
from pipeline.runtime import Runtime

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
    """Compute every shard that the draft does not hold yet.

    function: module-level function (spec, number) -> {file name: bytes}; `spec` must be picklable.
    sizes: `unit`s per shard, for the progress bar.  A shard that fails does not stop the others; at the end the failed
    ones are named in one error of the kind of the first.
    """
    pending = [number for number in range(len(sizes)) if not out.is_done(unit_name(number))]
    failures: dict[int, Exception] = {}
    with run.progress.bar(label, total=sum(sizes), unit=unit) as bar:
        bar.skip(sum(sizes) - sum(sizes[number] for number in pending))
        for number, outcome in run.cluster.map(partial(_compute, function, spec, out.path), pending):
            if isinstance(outcome, CannotWrite):  # a full disk fails the others too: do not compute them in vain
                raise outcome
            if isinstance(outcome, Exception):
                failures[number] = outcome
            else:
                out.record(unit_name(number), outcome)
                bar.advance(sizes[number])
    if failures:
        raise_failures(failures, len(sizes))


def shard_sizes(rows: int, per_shard: int) -> list[int]:
    """Rows of each shard: full ones and a rest."""
    return [min(per_shard, rows - start) for start in range(0, rows, per_shard)]


def unit_name(number: int) -> str:
    return f"shard-{number:06d}"


def raise_failures(failures: Mapping[int, Exception], shards: int) -> None:
    """One sentence for all failed shards; the exit code is that of the lowest-numbered one."""
    numbers = sorted(failures)
    first = failures[numbers[0]]
    named = ", ".join(str(number) for number in numbers[:10]) + (", ..." if len(numbers) > 10 else "")
    head = f"shard{'s' if len(numbers) > 1 else ''} {named} of {shards} failed, the others are kept: "
    if isinstance(first, SmaltiError):
        failure = copy(first)  # some kinds are made from other arguments than a message
        failure.message = head + first.message
        raise failure from first
    kind = _kind_of(first)
    raise kind(f"{head}{type(first).__name__}: {first}") from first


def _kind_of(failure: Exception) -> type[SmaltiError]:
    if isinstance(failure, MemoryError):
        return MemoryExhausted
    return StorageError if isinstance(failure, OSError) else WorkerError


def _compute(function: ShardFunction[Spec], spec: Spec, root: Path, number: int) -> list[FileEntry]:
    return write_files(root, function(spec, number))
