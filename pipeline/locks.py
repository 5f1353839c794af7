"""Locks between processes: an exclusive one per key, and a shared one on the store that excludes garbage collection.

Both use `flock`: the kernel releases them when the holder dies. A lock's file names its holder, for messages.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.errors import Busy, CannotWrite

SUFFIX = ".lock"
PATIENCE = 1.5  # seconds of waiting before it is reported
POLL = 0.05
GLANCE = 0.1  # seconds, also without waiting: `find_holder` of another process holds a lock for a moment

Say = Callable[[str], None]
"""Prints a line."""


def silent(text: str) -> None:
    """Print nothing."""


@dataclass(frozen=True)
class Holder:
    """The holder of a lock. since: local time, `2026-01-31 12:00:00`."""

    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        known = f"process {self.pid} on {self.host} since {self.since}"
        return known if self.pid else "a process that did not say which"


@contextmanager
def lock(path: Path, *, wait: bool, say: Say = silent) -> Iterator[None]:
    """Hold `path` with flock; the file is removed by its holder, so a waiter checks that it locked the present one.

    wait: False raises Busy (exit code 75) where another process holds it.  say: prints for which process this one waits.
    """
    descriptor = _acquire(path, wait=wait, say=say)
    _held.add(descriptor)
    try:
        with suppress(OSError):  # a full disk: the lock holds without its note
            os.truncate(descriptor, 0)
            os.pwrite(
                descriptor,
                json.dumps(asdict(Holder(platform.node(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")))).encode(),
                0,
            )
        yield
    finally:
        path.unlink(missing_ok=True)
        _let_go(descriptor)


@contextmanager
def steady(root: Path, *, alone: bool = False, say: Say = silent) -> Iterator[None]:
    """Within this block no process removes garbage from the store; alone: no other process starts to use artifacts."""
    if not root.is_dir():
        yield
        return
    descriptor = os.open(root, os.O_RDONLY | os.O_CLOEXEC)
    _held.add(descriptor)
    how = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    why = "other processes open artifacts" if alone else "garbage is being removed from it"
    try:
        _patiently(descriptor, how, lambda: say(f"  waiting for {root}: {why}"), seconds=PATIENCE)
        yield
    finally:
        _let_go(descriptor)


def find_holder(path: Path) -> Holder | None:
    """The present holder of this lock, or None."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return None if _try(descriptor, fcntl.LOCK_SH) else _read_holder(descriptor)
    finally:
        os.close(descriptor)


_held: set[int] = set()


def _let_go(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _let_go_of_all() -> None:
    """A forked process must not hold locks of its parent: they would outlive the parent."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go_of_all)


def _acquire(path: Path, *, wait: bool, say: Say) -> int:
    while True:
        durable.make_folder(path.parent)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CannotWrite(f"cannot create the lock {path}: {error.strerror}", path=path) from error
        try:
            _await(descriptor, path, wait=wait, say=say)
        except BaseException:
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):  # its holder removed it while we waited
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        os.close(descriptor)


def _await(descriptor: int, path: Path, *, wait: bool, say: Say) -> None:
    what = f"{path.stem[:12]} ({path.parent.name})"

    def complain() -> None:
        holder = _read_holder(descriptor)
        if not wait:
            hint = "wait for it, or run without --no-wait"
            raise Busy(f"another process is making {what}: {holder}", path=path, hint=hint)
        say(f"  waiting for {what}, which is being made by {holder}")

    _patiently(descriptor, fcntl.LOCK_EX, complain, seconds=PATIENCE if wait else GLANCE)


def _patiently(descriptor: int, how: int, complain: Callable[[], None], *, seconds: float) -> None:
    """Lock an open file; call `complain` if it takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while not _try(descriptor, how):
        if time.monotonic() > deadline:
            complain()
            fcntl.flock(descriptor, how)
            return
        time.sleep(POLL)


def _try(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_holder(descriptor: int) -> Holder:
    try:
        found: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
        return Holder(str(found["host"]), int(found["pid"]), str(found["since"]))
    except (OSError, ValueError, KeyError, TypeError):  # it has not written its note yet
        return Holder("", 0, "")
