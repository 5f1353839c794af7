"""Figures for TensorBoard: one event file for each attempt, and every figure on the disk before the next one comes.

The usual writer keeps figures in a thread for two minutes, so that a killed training lost them, and a full disk was met
by that thread.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

from pipeline.durable import make_folder, refusals


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
