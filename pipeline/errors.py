"""Errors of the pipeline: the public family of `smalti.errors` and the kinds that only a run can meet."""

from __future__ import annotations

from smalti.errors import CorruptError, InputError, SmaltiError, UsageError

__all__ = [
    "Busy",
    "CannotWrite",
    "CorruptError",
    "InputError",
    "MemoryExhausted",
    "NewerFormat",
    "NumericError",
    "SmaltiError",
    "StorageError",
    "UsageError",
    "WorkerError",
]


class NewerFormat(CorruptError):
    """An artifact that a later version of smalti made: whole, but not for this one to read (exit code 4)."""


class NumericError(SmaltiError):
    """NaN or infinity in a loss, gradient, feature or centroid (exit code 5)."""

    exit_code = 5


class WorkerError(SmaltiError):
    """A worker kept dying, or a shard kept failing (exit code 70)."""

    exit_code = 70


class MemoryExhausted(SmaltiError):
    """The device or the host ran out of memory (exit code 71)."""

    exit_code = 71


class CannotWrite(SmaltiError):
    """The output cannot be written: read-only, disk full, file size limit (exit code 73)."""

    exit_code = 73


class StorageError(SmaltiError):
    """Reading failed below us: disk or network (exit code 74)."""

    exit_code = 74


class Busy(SmaltiError):
    """Somebody else holds the lock (exit code 75)."""

    exit_code = 75
