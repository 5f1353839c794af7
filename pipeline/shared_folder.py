"""A check that another process reads and writes the same folder as this one: by a nonce file, and its copy beside it.

On another host the same path may be missing, or be another folder. Network file systems may show a new file late, so both
sides wait `SEEN_SECONDS` for it.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from pipeline import durable

SEEN_SECONDS = 3.0
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Answer:
    """The answer of a process. copy: name of the file that it wrote.  reason: why there is none, else empty."""

    host: str
    started_in: str
    copy: str
    reason: str = ""

    @property
    def who(self) -> str:
        return f"host {self.host}, started in {self.started_in}"


@contextmanager
def asking(folder: Path) -> Iterator[Path]:
    """Yield a new nonce file in `folder`; it and its copies are removed at the end (after a kill, by `Draft.open`)."""
    nonce = folder / f".nonce-{uuid4().hex}"
    with durable.refusals(nonce):
        nonce.write_bytes(os.urandom(16).hex().encode())
    try:
        yield nonce
    finally:
        with suppress(OSError):
            for path in folder.glob(f"{nonce.name}*"):
                path.unlink()


def answer(nonce: Path, seconds: float) -> Answer:
    """In the other process: read the nonce, which may take `seconds` to appear, and write a copy beside it.

    Where the nonce does not appear, nothing is written.
    """
    host, started_in = platform.node(), str(Path.cwd())
    if not becomes_true(nonce.is_file, seconds):
        return Answer(host, started_in, "", "it does not see the file that was written there for it")
    copy = nonce.with_name(f"{nonce.name}-{uuid4().hex}")
    try:
        copy.write_bytes(nonce.read_bytes())
    except OSError as error:
        return Answer(host, started_in, "", f"it cannot write there: {error.strerror or error}")
    return Answer(host, started_in, copy.name)


def find_fault(nonce: Path, given: Answer) -> str:
    """Why the other process does not read and write this folder; empty if it does."""
    if given.reason:
        return given.reason
    copy, want = nonce.with_name(given.copy), nonce.read_bytes()
    if becomes_true(lambda: copy.is_file() and copy.read_bytes() == want, SEEN_SECONDS):
        return ""
    return "what it writes there is not seen here"


def becomes_true(is_true: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition; False if it does not hold within `seconds`."""
    deadline = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True
