"""The exceptions: each message is a sentence, each class has an exit code (docs/artifacts.md)."""

from __future__ import annotations

from os import PathLike, fspath


class SmaltiError(Exception):
    """Root of all errors that are reported to users.

    message: one sentence with what, where, found, expected.  path: the file or folder concerned, if any.
    hint: what to do next.
    """

    exit_code = 70

    def __init__(self, message: str, *, path: str | PathLike[str] | None = None, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.path = None if path is None else str(path)
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}; {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:  # pickles exceptions with keyword arguments, for dask
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(kind: type[SmaltiError], args: tuple[object, ...], state: dict[str, object]) -> SmaltiError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class UsageError(SmaltiError):
    """A command, recipe or config is not valid (exit code 2)."""

    exit_code = 2


class InputError(SmaltiError):
    """Input data is missing or invalid (exit code 3)."""

    exit_code = 3


class CorruptError(SmaltiError):
    """An artifact is damaged, or not the expected one (exit code 4)."""

    exit_code = 4


def corrupt_error(path: str | PathLike[str], found: str, *, hint: str | None = None) -> CorruptError:
    """The error for a damaged file: `<path> <found>` and what to do."""
    hint = hint or "restore the file from a copy, or make the artifact again"
    return CorruptError(f"{fspath(path)} {found}", path=path, hint=hint)
