"""Memory and time of what grows with the data, on synthetic data of ImageNet's sizes.

    python -m benchmarks large                        # every part; hours on two cores
    python -m benchmarks large copies precision       # some parts
    python -m benchmarks large nearness --scale 0.01  # of a hundredth of the size

A part is a module of this folder with `measure(scale, folder)`: it makes its data (scale 1: as many rows as ImageNet has),
calls what the stages call within `Measured()`, and yields rows of the table. Each part runs in a process of its own. Memory
is the highest anonymous memory above what the process held before, seen every few milliseconds: pages of mapped files are
not counted, since the system takes them back. To add a part, add its module and its name to `PARTS`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

PARTS = ("scan", "copies", "histogram", "usage", "nearness", "precision", "probe", "checkpoints")
LIMIT_MIB = 2048
POLL_SECONDS = 0.005


class Row(NamedTuple):
    """A line of the table. cpu_seconds: of all threads, which a busy machine changes less than seconds.

    times: how many times as much work the full size is.
    """

    what: str
    size: str
    mebibytes: float
    seconds: float
    cpu_seconds: float
    times: float


class Measured:
    """Within this block memory is watched; afterwards `row` says what it took."""

    def __enter__(self) -> Measured:
        self._before, self._highest, self._ends = anonymous_bytes(), 0, threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.seconds, self.cpu_seconds = time.perf_counter() - self._started, time.process_time() - self._cpu_started
        self._ends.set()
        self._watcher.join()
        self.mebibytes = max(0, self._highest - self._before) / 2**20

    def row(self, what: str, size: str, *, times: float) -> Row:
        return Row(what, size, self.mebibytes, self.seconds, self.cpu_seconds, times)

    def _watch(self) -> None:
        while not self._ends.wait(POLL_SECONDS):
            self._highest = max(self._highest, anonymous_bytes())


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status does not say RssAnon: measure on Linux")


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks large", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none: all")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full number of rows")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # measure this part in this process
    options = parser.parse_args(arguments)
    if options.one:
        measure_here(options.one, options.scale)
        return
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {min(unknown)}: take some of {', '.join(PARTS)}")
    print(f"Share of the full size: {options.scale:g}.\n")
    print(
        "| part | what | measured size | memory | <= 2 GiB | s | CPU s | full size, CPU s |\n|---|---|---|---|---|---|---|---|"
    )
    for name in options.parts or PARTS:
        for row in in_a_process(name, options.scale):
            holds = "holds" if row.mebibytes <= LIMIT_MIB else "MISSED"
            whole = f"{row.times * row.cpu_seconds:,.0f}{' (extrapolated)' * (row.times > 1.01)}"
            print(
                f"| {name} | {row.what} | {row.size} | {row.mebibytes:,.0f} MiB | {holds} | {row.seconds:,.1f} | {row.cpu_seconds:,.1f} | {whole} |",
                flush=True,
            )


def in_a_process(name: str, scale: float) -> list[Row]:
    command = [sys.executable, "-m", "benchmarks", "large", "--one", name, "--scale", str(scale)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [Row(*json.loads(line)) for line in said.splitlines()]


def measure_here(name: str, scale: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for row in importlib.import_module(f"benchmarks.large.{name}").measure(scale, Path(folder)):
            print(json.dumps(row), flush=True)
