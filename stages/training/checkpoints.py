"""Checkpoints: the state of a training as one safetensors file in the draft's scratch folder, and their schedule.

Names in the file: `model.<part>.<tensor>`, `optimizer.<part>.<parameter>.<moment>`, `average.<part>.<parameter>`, and
the engine's numbers as `engine.<name>`. A checkpoint is a journaled unit of the draft, so a partial one is never used.

A thread writes while the training goes on, from a copy in the host's memory. Saves take a small share of the time: after
one that took d seconds the next comes no sooner than 20 d later. A killed training continues from the last complete
checkpoint; errors of the thread are raised at the next step. One save at a time writes into the draft.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from models.adapters.layout import compare, how_many, shapes, table
from pipeline.draft import SCRATCH, Draft
from pipeline.errors import CorruptError, NumericError
from stages.devices import free_bytes
from stages.training.trained_part import State
from stages.weights.files import write_tensors

KEEP = 2  # the last ones
PREFIX = "checkpoint-"
BEST = "best-"

REST = 20.0  # times the duration of a save until the next one
SMALL = 2**26  # bytes that are written in less time than a step is worth
ROOM = 2.0  # times the size of a copy that has to be free for it


def save_checkpoint(out: Draft, step: int, state: State) -> None:
    """Write the state after `step` steps, and drop checkpoints that are no longer needed."""
    write_state(out, f"{PREFIX}{step:08d}", state)
    for unit in _units(out, PREFIX)[:-KEEP]:
        out.drop(unit)


def save_best(out: Draft, step: int, state: State) -> None:
    """Write the best evaluated weights, made after `step` steps."""
    write_state(out, f"{BEST}{step:08d}", state)


def drop_worse(out: Draft, best_step: int) -> None:
    """Remove all weights kept as best except those of `best_step`."""
    for unit in _units(out, BEST):
        if unit != f"{BEST}{best_step:08d}":
            out.drop(unit)


def newest_checkpoint(out: Draft) -> Path | None:
    """File of the last checkpoint, if there is one."""
    units = _units(out, PREFIX)
    return out.files(units[-1])[0] if units else None


def best_beside(checkpoint: Path, step: int) -> Path:
    """File of the weights kept as best after `step` steps, in the folder of a checkpoint that knows of them."""
    return checkpoint.with_name(Path(_file(f"{BEST}{step:08d}")).name)


def write_state(out: Draft, unit: str, state: State) -> None:
    """Record a unit of tensors, unless it is there already; a state with NaN or infinity is never written."""
    if out.is_done(unit):
        return
    bad = [name for name, tensor in state.items() if not _is_sound(name, tensor)]
    if bad:
        raise NumericError(f"the training state holds NaN or infinity in {bad[0]} and is not saved ({unit})")
    with out.streaming(unit, _file(unit)) as file:
        write_tensors(file, state)


def read_state(path: Path) -> State:
    """Tensors of a checkpoint; the draft checked its SHA-256 when it was opened."""
    from safetensors.torch import load_file

    return load_file(path)


def check_fits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """CorruptError (exit code 4) with a table where names or shapes differ from those of this training, but for its optimizer's."""
    found, wanted = (
        {name: one for name, one in state.items() if not name.startswith("optimizer.")} for state in (found, wanted)
    )
    differences = compare(shapes(found), shapes(wanted))
    if differences:
        raise CorruptError(
            f"the checkpoint {path} belongs to another training: {how_many(differences)}\n" + table(differences),
            path=path,
            hint="remove the draft folder to begin anew",
        )


def _units(out: Draft, prefix: str) -> list[str]:
    return sorted(unit for unit in out.units() if unit.startswith(prefix))


def _file(unit: str) -> str:
    return f"{SCRATCH}/{unit}.safetensors"


def _is_sound(name: str, tensor: Tensor) -> bool:
    """Whether a tensor may be saved; the engine's own numbers may be infinite ("none yet")."""
    return name.startswith("engine.") or not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


class Saver:
    """The saves of one training. At the end of its block the thread is joined, except after a signal.

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

    def save(self, step: int, state: State, *, best_step: int, waits: bool) -> None:
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
        """Raise the error of a finished thread."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the thread, and raise its error."""
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _try(self, step: int, state: State, best_step: int) -> None:
        try:
            self._write(step, state, best_step)
        except BaseException as error:
            self._error = error

    def _write(self, step: int, state: State, best_step: int) -> None:
        began = time.monotonic()
        save_checkpoint(self.out, step, state)
        drop_worse(self.out, best_step)
        self._ended = time.monotonic()
        self.duration = self._ended - began
        self.last = f"step {step}"


def pause_after(duration: float, seconds: float) -> float:
    """Seconds between a save that took `duration` and the next; 0 where every step is saved."""
    return max(seconds, REST * duration) if seconds else 0.0
