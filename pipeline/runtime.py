"""The environment of a running stage, which is not part of the key."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from pipeline.cluster import Cluster
from pipeline.progress import Progress

GRACE_SECONDS = 0.5  # for the main thread to exit by itself after a second Ctrl-C


class Terminated(BaseException):
    """SIGTERM or SIGUSR1 arrived (exit code 143); a BaseException, so that no handler catches it."""


@dataclass
class Stop:
    """Set by a signal within `Runtime.deferred`: exit at the next safe point with `leave()`."""

    requested: type[BaseException] | None = None

    def leave(self) -> None:
        """Raise the exception of the signal, if one arrived."""
        if self.requested is not None:
            raise self.requested()


@dataclass
class Runtime:
    """Device, threads, cluster, progress and logs of one attempt.

    device: "auto", "cpu" or "cuda".  threads: of a training step; shards set their own (1).
    checkpoint_seconds: interval of a training's checkpoints.  paths: external data by the names of the declaration.
    """

    cluster: Cluster
    progress: Progress
    log: Path
    device: str = "auto"
    threads: int = 1
    checkpoint_seconds: float = 30.0
    paths: dict[str, Path] = field(default_factory=dict)

    @contextmanager
    def deferred(self) -> Iterator[Stop]:
        """Within this block SIGINT, SIGTERM and SIGUSR1 only set the flag: a step is finished and saved first.

        Another SIGINT exits at once: the draft is consistent at every moment and has the last checkpoint.
        """
        stop = Stop()

        def ask(number: int, frame: FrameType | None) -> None:
            is_first, stop.requested = (
                stop.requested is None,
                KeyboardInterrupt if number == signal.SIGINT else Terminated,
            )
            if is_first:
                self.progress.say("  finishing the step and saving; press Ctrl-C again to leave at once")
            elif number == signal.SIGINT:
                stop.leave()

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        try:
            before = {number: signal.signal(number, ask) for number in numbers}
        except ValueError:  # only the main thread handles signals
            yield stop
            return
        try:
            with _watched_interrupts():
                yield stop
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _watched_interrupts() -> Iterator[None]:
    """Within this block a second SIGINT ends the process, if necessary from another thread.

    Python calls handlers between two of its instructions, and only once for several pending signals: a long operation of
    a library would hide the second.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    left = threading.Event()

    def watch() -> None:
        count = 0
        while arrived := ours.recv(64):
            count += arrived.count(signal.SIGINT)
            if count > 1 and not left.wait(GRACE_SECONDS):
                os._exit(128 + signal.SIGINT)

    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="second Ctrl-C", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        theirs.close()
        watcher.join()
        ours.close()
