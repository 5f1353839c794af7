"""When a training saves itself, and how: while it goes on, in a thread, from a copy in the host's memory.

Saves take a small share of the time: after one that took d seconds the next comes no sooner than 20 d later. The thread
writes as the training itself would, so whoever is killed at any moment continues from the last whole checkpoint; what it
cannot write is raised at the next step. One save at a time touches the draft.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

import torch

from pipeline.draft import Draft
from stages.devices import free_bytes
from stages.training import checkpoints

REST = 20.0  # times the duration of a save until the next one
SMALL = 2**26  # bytes that are written in less time than a step is worth
ROOM = 2.0  # times the size of a copy that has to be free for it


class Saver:
    """The saves of one training. Within its block it is made sure of that the thread has ended; but not if a signal hurries.

    duration: of the last save, in seconds.  last: the last whole checkpoint, in words.
    """

    def __init__(self, out: Draft):
        self.out = out
        self.duration = 0.0
        self.last = "none yet"
        self._ended = time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):
            self._join()

    def is_due(self, seconds: float) -> bool:
        """Whether it is time to save. seconds: at least so many after the last save; 0: after every step."""
        is_writing = self._thread is not None and self._thread.is_alive()
        return not is_writing and time.monotonic() - self._ended >= pause_after(self.duration, seconds)

    def save(self, step: int, state: checkpoints.State, *, best_step: int, waits: bool) -> None:
        """Save the state after `step` steps, in a thread if it may be and memory has room for a copy."""
        self.wait()
        size = sum(tensor.nbytes for tensor in state.values())
        if waits or size < SMALL or free_bytes(torch.device("cpu")) < ROOM * size:
            self._write(step, state, best_step)
            return
        copy = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
        self._thread = threading.Thread(target=self._try, args=(step, copy, best_step), name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what a thread met that has ended."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the thread, and raise what it met."""
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _try(self, step: int, state: checkpoints.State, best_step: int) -> None:
        try:
            self._write(step, state, best_step)
        except BaseException as error:
            self._error = error

    def _write(self, step: int, state: checkpoints.State, best_step: int) -> None:
        began = time.monotonic()
        checkpoints.save_checkpoint(self.out, step, state)
        checkpoints.drop_worse(self.out, best_step)
        self._ended = time.monotonic()
        self.duration = self._ended - began
        self.last = f"step {step}"


def pause_after(duration: float, seconds: float) -> float:
    """Seconds between a save that took `duration` and the next; 0 where every step is saved."""
    return max(seconds, REST * duration) if seconds else 0.0
