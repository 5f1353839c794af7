"""The machine and the versions behind a figure."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from pipeline.runlog import git_revision, versions


def describe_machine() -> str:
    """Markdown lines: processor, cores, versions, revision."""
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"Machine: {_processor()}, {os.cpu_count()} cores. Python {platform.python_version()}, {found}. Revision {git_revision()}."


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
