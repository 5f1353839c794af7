"""Codes in memory, behind the same calls as codes on disk, and the question whether they fit."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smalti.errors import UsageError

SHARE_OF_FREE = 0.5
CGROUP = Path("/sys/fs/cgroup")


class LoadedArray:
    """An array in memory that answers like smalti.mapped.MappedArray."""

    is_mapped = True

    def __init__(self, values: NDArray[Any]) -> None:
        self._values = values

    @property
    def shape(self) -> tuple[int, ...]:
        return self._values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._values.dtype

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        return np.array(self._values[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self._values, dtype=dtype, copy=copy)

    def rows(self, indices: ArrayLike, *, axes: int = 1) -> NDArray[Any]:
        flat = self._values.reshape(math.prod(self.shape[:axes]), *self.shape[axes:])
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(flat)):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} are asked for, of {len(flat)}")
        return flat[wanted]

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows {start} to {stop} are asked for, of {len(self)}")
        return self._values[start:stop].copy()

    def read(self) -> NDArray[Any]:
        return self._values.copy()


def check_fits_in_memory(needed: int, where: str) -> None:
    """UsageError where `needed` bytes are more than half of what is free."""
    free = free_memory()
    if needed > SHARE_OF_FREE * free:
        mib = 2**20
        message = f"{where} needs {needed // mib} MiB, more than half of the {free // mib} MiB that are free"
        raise UsageError(message, hint="read it mapped, without load()")


def free_memory() -> int:
    """Bytes that this process may still use: what the machine has free, or less where a control group says so."""
    return min(_free_of_machine(), _free_of_group())


def _free_of_machine() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = (line.split() for line in meminfo.read_text("ascii").splitlines())
        return next(int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # no such figure elsewhere: assume half


def _free_of_group() -> int:
    largest, current = CGROUP / "memory.max", CGROUP / "memory.current"
    if not largest.exists() or not current.exists() or not (text := largest.read_text("ascii").strip()).isdecimal():
        return 2**63 - 1
    return max(0, int(text) - int(current.read_text("ascii")))
