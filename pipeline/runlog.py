"""log/run.json: one entry per attempt, with host, versions, threads, revision and command."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from contextlib import nullcontext, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline import durable
from pipeline.errors import CannotWrite

TAIL = 2**16  # bytes of metrics.jsonl that hold its last lines
LIBRARIES = [
    "smalti",
    "torch",
    "torchvision",
    "numpy",
    "zarr",
    "faiss-gpu",
    "faiss-cpu",
    "timm",
    "dask",
    "torch-fidelity",
]


class Attempt:
    """Context of one attempt: its entry is written at the start and completed at the end."""

    def __init__(self, path: Path, *, device: str, threads: int, command: str):
        self.path = path
        self.started = time.time()
        self.entry: dict[str, Any] = {
            "host": platform.node(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self.started)),
            "device": device,
            "threads": threads,
            "world_size": int(os.environ.get("WORLD_SIZE", "1")),
            "python": platform.python_version(),
            "versions": versions(),
            "git": git_revision(),
            "command": command,
            "outcome": "interrupted",
        }

    def __enter__(self) -> Attempt:
        self.earlier = read_attempts(self.path)
        self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.entry["seconds"] = round(time.time() - self.started, 3)
        self.entry["outcome"] = "done" if kind is None else kind.__name__
        with suppress(CannotWrite) if error else nullcontext():  # on a full disk, the first error is reported
            self._write()

    def _write(self) -> None:
        text = json.dumps({"attempts": [*self.earlier, self.entry]}, indent=1)
        durable.write_file(self.path, text.encode())


def read_attempts(path: Path) -> list[dict[str, Any]]:
    """The entries of run.json; an unreadable log counts as empty."""
    try:
        return [dict(entry) for entry in json.loads(path.read_bytes())["attempts"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def last_threads(log: Path) -> int:
    """Threads of the last attempt; 0 where there was none."""
    attempts = read_attempts(log / "run.json")
    found = attempts[-1].get("threads") if attempts else None
    return found if isinstance(found, int) else 0


def total_seconds(log: Path) -> float:
    """Seconds of all attempts together."""
    return float(sum(entry.get("seconds", 0.0) for entry in read_attempts(log / "run.json")))


def last_step(log: Path) -> int | None:
    """The last step in metrics.jsonl, or None."""
    try:
        with (log / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return None


@cache
def versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found


@cache
def git_revision() -> str | None:
    """Revision of the checkout of this code, or None outside of one."""
    command, folder = ["git", "rev-parse", "HEAD"], Path(__file__).parent
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()
    return None
