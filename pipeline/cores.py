"""Cores: how many this process may use, and how many of them are its own beside others on the same machine.

Images are decoded by as many threads as that: which thread decodes an image changes none of its bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

from pipeline import ranks

Result = TypeVar("Result")

_tasks: ContextVar[int] = ContextVar("tasks", default=1)


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_cores() -> int:
    """Cores for this thread's work, where other processes of a launch or tasks of a cluster work on this machine."""
    return max(1, core_count() // max(_tasks.get(), ranks.local_world_size()))


def usual_threads() -> int:
    """Threads of a training step where nobody says how many: one core is left to whatever else runs.

    A step waits for its slowest thread, so with as many threads as cores one other busy process makes it slower than a
    single thread is.
    """
    return max(1, (core_count() - 1) // ranks.local_world_size())


def work_beside(tasks: int, function: Callable[[int], Result], number: int) -> Result:
    """`function(number)`, as one of `tasks` that may run on this machine at the same time."""
    before = _tasks.set(tasks)
    try:
        return function(number)
    finally:
        _tasks.reset(before)
