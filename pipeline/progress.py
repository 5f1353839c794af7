"""Progress and metrics: bars on a terminal, plain lines elsewhere, and JSON lines in the artifact's log."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from pipeline.durable import refusals, write_file

LINE_SECONDS = 10.0


class Progress:
    """The reports of a stage. stream: None prints nothing; a terminal gets bars, any other stream a line every 10 s."""

    def __init__(self, stream: TextIO | None = None, log: Path | None = None):
        self.stream = stream
        self.log = log
        self._above: Console | None = None
        """The console that prints above a bar while one is shown."""

    @classmethod
    def on_stderr(cls, *, quiet: bool = False) -> Progress:
        return cls(None if quiet else sys.stderr)

    def into(self, log: Path) -> Progress:
        """The same output, with metrics appended to `log`/metrics.jsonl, after its last complete line."""
        progress = Progress(self.stream, log / "metrics.jsonl")
        progress.forget_after(math.inf)
        return progress

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._above is not None:
            self._above.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self.stream is not None:
            print(text, file=self.stream, flush=True)

    def record(self, event: str, **numbers: Any) -> None:
        """Append one JSON line to the log."""
        if self.log is not None:
            with refusals(self.log), self.log.open("a") as file:
                file.write(json.dumps({"event": event, "time": round(time.time(), 3), **numbers}) + "\n")

    def forget_after(self, step: float) -> None:
        """Drop lines of an interrupted attempt after `step`, which will be repeated, and an incomplete last line."""
        if self.log is None or not self.log.exists():
            return
        lines = self.log.read_bytes().splitlines(keepends=True)
        kept = list(takewhile(lambda line: _is_until(step, line), lines))
        if len(kept) < len(lines):
            write_file(self.log, b"".join(kept))

    @contextmanager
    def bar(self, label: str, *, total: int, unit: str) -> Iterator[Bar]:
        """A bar over `total` units; `advance` it."""
        bar = Bar(self, label, total, unit)
        if self.stream is not None and self.stream.isatty():
            with RichProgress(*_columns(), console=Console(file=self.stream)) as rich:
                bar.rich = (rich, rich.add_task(label, total=total, rate=0.0, unit=unit, figures=""))
                self._above = rich.console
                try:
                    yield bar
                finally:
                    self._above = None
        else:
            yield bar
        bar.close()


class Bar:
    """The progress of one task: units done, rate, time left, and the latest figures."""

    def __init__(self, progress: Progress, label: str, total: int, unit: str):
        self.progress, self.label, self.total, self.unit = progress, label, total, unit
        self.done = self.skipped = self.told = 0
        self.figures = ""
        self.started = self.said = time.monotonic()
        self.rich: tuple[RichProgress, TaskID] | None = None
        """Where it is shown, on a terminal."""

    def skip(self, units: int) -> None:
        """Count units that an earlier attempt finished, without effect on the rate."""
        self.done += units
        self.skipped += units
        self.told += units
        self._show()

    def advance(self, units: int, **figures: float) -> None:
        """Count finished units; `figures` are shown beside the bar."""
        self.done += units
        if figures:
            self.figures = " ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self._show()

    def close(self) -> None:
        seconds = time.monotonic() - self.started
        self.progress.record(
            "done", label=self.label, units=self.done, seconds=round(seconds, 3), rate=round(self.rate, 3)
        )
        if self.rich is None:
            self._say()

    @property
    def rate(self) -> float:
        """Units per second in this attempt."""
        return (self.done - self.skipped) / max(time.monotonic() - self.started, 1e-9)

    def _show(self) -> None:
        if self.rich is not None:
            rich, task = self.rich
            rich.update(task, completed=self.done, rate=self.rate, figures=self.figures)
        elif time.monotonic() - self.said >= LINE_SECONDS:
            self._say()
            self.progress.record(
                "progress", label=self.label, units=self.done, total=self.total, rate=round(self.rate, 3)
            )

    def _say(self) -> None:
        now = time.monotonic()
        recent = (self.done - self.told) / max(
            now - self.said, 1e-9
        )  # since the last line, as the load of the machine may change
        ending = f", {(self.total - self.done) / recent:.0f} s left" if self.done < self.total and recent else ""
        self.said, self.told = now, self.done
        self.progress.say(
            f"  {self.label}: {self.done}/{self.total} {self.unit}, {self.rate:.1f}/s{ending} {self.figures}".rstrip()
        )


class _Rate(ProgressColumn):
    def render(self, task: Any) -> Text:
        return Text(f"{task.fields['rate']:.1f} {task.fields['unit']}/s")


def _is_until(step: float, line: bytes) -> bool:
    """Whether a line of the log is complete and not of a later step."""
    try:
        return line.endswith(b"\n") and json.loads(line).get("step", 0) <= step
    except ValueError:
        return False


def _columns() -> list[ProgressColumn]:
    figures = TextColumn("{task.fields[figures]}")
    return [
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        figures,
    ]
