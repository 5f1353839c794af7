"""The figures of a running training: JSON lines, TensorBoard for long runs, and progress.

TensorBoard gets one event file per attempt, written synchronously: its usual writer buffers figures in a thread for two
minutes, so that a killed training loses them, and errors of a full disk occur in that thread.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

from pipeline.durable import make_folder, refusals
from pipeline.runtime import Runtime
from stages.training.config import TrainingConfig

LINES = 200  # log lines of one training, whatever its length
TENSORBOARD_STEPS = 2000  # shorter trainings have no TensorBoard log


class Metrics:
    """Decides which steps are logged, and writes their figures."""

    def __init__(self, run: Runtime, config: TrainingConfig, *, images: int, first_step: int, has_board: bool):
        """Continue the log of the first `first_step` steps.  images: of the data, in which epochs are counted."""
        run.progress.forget_after(first_step)
        self._run, self._images = run, images
        self._every = max(1, config.steps // LINES)
        self._steps, self._batch = config.steps, config.batch
        self._since, self._at = first_step, time.monotonic()
        has_board = has_board and config.steps >= TENSORBOARD_STEPS
        self._board = Board(run.log / "tensorboard", first_step=first_step) if has_board else None

    def is_due(self, steps: int) -> bool:
        """Whether figures are logged after so many steps."""
        return steps % self._every == 0 or steps == self._steps

    def write(self, steps: int, figures: dict[str, float]) -> None:
        """Log the figures of the step after which `steps` are done, with the rate since the last line, and the epochs."""
        now = time.monotonic()
        rate = (steps - self._since) * self._batch / max(now - self._at, 1e-9)
        self._since, self._at = steps, now
        epochs = round(steps * self._batch / self._images, 4)
        self.record("train", steps, {**figures, "rows_per_second": round(rate, 2), "epochs": epochs})

    def record(self, event: str, step: int, figures: dict[str, float]) -> None:
        self._run.progress.record(event, step=step, **figures)
        if self._board is not None:
            self._board.add(event, step, figures)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: object) -> None:
        if self._board is not None:
            self._board.close()


class Board:
    """An open event file below `folder`; figures of earlier attempts that come after `first_step` steps are taken back."""

    def __init__(self, folder: Path, *, first_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        self._path = folder / f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{os.getpid()}"
        make_folder(folder)
        with refusals(self._path):
            self._records = RecordWriter(self._path.open("ab"))
        self._write(step=first_step + 1, file_version="brain.Event:2")
        self._write(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, event: str, step: int, figures: dict[str, float]) -> None:
        """Write the figures of a step as scalars `event`/name."""
        values = [self._summary.Value(tag=f"{event}/{name}", simple_value=value) for name, value in figures.items()]
        self._write(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        with refusals(self._path):
            self._records.close()

    def _write(self, **content: Any) -> None:
        with refusals(self._path):
            self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
            self._records.flush()
