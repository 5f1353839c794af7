"""Free memory, and whether codes fit into it."""

from __future__ import annotations

import os
from pathlib import Path

from smalti.errors import UsageError

SHARE_OF_FREE = 0.5
CGROUP = Path("/sys/fs/cgroup")


def check_fits_in_memory(needed: int, where: str) -> None:
    """UsageError where `needed` bytes are more than half of the free memory."""
    free = free_memory()
    if needed > SHARE_OF_FREE * free:
        message = f"{where} needs {needed >> 20} MiB, more than half of the {free >> 20} MiB that are free"
        raise UsageError(message, hint="read it mapped, without load()")


def free_memory() -> int:
    """Bytes that this process may still allocate: free memory of the machine, limited by its control group."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # without /proc/meminfo: half
    meminfo, largest, current = Path("/proc/meminfo"), CGROUP / "memory.max", CGROUP / "memory.current"
    if meminfo.exists():
        lines = (line.split() for line in meminfo.read_text("ascii").splitlines())
        free = next(int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:")
    if largest.exists() and current.exists() and (limit := largest.read_text("ascii").strip()).isdecimal():
        free = min(free, max(0, int(limit) - int(current.read_text("ascii"))))
    return free
