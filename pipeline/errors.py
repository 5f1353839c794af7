"""Errors of the pipeline: those of `smalti.errors`, and those that only occur in runs."""

from __future__ import annotations

import shlex
from os import PathLike

from smalti.errors import CorruptError, InputError, SmaltiError, UsageError

__all__ = [
    "BadImages",
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
    """An artifact of a later version of smalti, which this version cannot read (exit code 4)."""


class NumericError(SmaltiError):
    """NaN or infinity in a loss, gradient, feature or centroid (exit code 5)."""

    exit_code = 5


class WorkerError(SmaltiError):
    """A worker died repeatedly, or a shard failed repeatedly (exit code 70)."""

    exit_code = 70


class MemoryExhausted(SmaltiError):
    """The device or the host ran out of memory (exit code 71)."""

    exit_code = 71


class CannotWrite(SmaltiError):
    """The output cannot be written: read-only, disk full, file size limit (exit code 73)."""

    exit_code = 73


class StorageError(SmaltiError):
    """An I/O error of disk or network (exit code 74)."""

    exit_code = 74


class Busy(SmaltiError):
    """Another process holds the lock (exit code 75)."""

    exit_code = 75


class BadImages(InputError):
    """Images that cannot be used, which the step that indexes them can leave out (exit code 3).

    command: the command of that step.  image_set: the key of their image set, "" while it is being made.
    setting: the setting of that step that leaves them out, or "".  listed: a file that lists them for its --exclude, or "".
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | PathLike[str] | None = None,
        command: str = "smalti index",
        image_set: str = "",
        setting: str = "decode.corrupt=skip",
        listed: str = "",
    ):
        super().__init__(message, path=path)
        self.command, self.image_set, self.setting, self.listed = command, image_set, setting, listed
        self._advise(f"{command} --set ", "--exclude " if setting else f"{command} --exclude ")

    def advise_in_recipe(self, step: str) -> None:
        """Name in the hint the settings of the recipe's step that indexes the images."""
        self._advise(f"--set {step}.", f"--set {step}.paths.exclude=")

    def _advise(self, setting: str, exclude: str) -> None:
        ways = [setting + self.setting] if self.setting else []
        ways += [f"{exclude}{shlex.quote(self.listed)}, which lists all"] if self.listed else []
        self.hint = (
            f"repair or remove the bad images, or leave them out when the images are indexed: {', or '.join(ways)}"
        )
