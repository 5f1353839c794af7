"""CPU cores: those that this process may use, and its share beside other processes on the same machine.

Images are decoded by that many threads; the number of threads does not change results.
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
    """Cores for this task, beside other processes of a launch or tasks of a cluster on this machine."""
    return max(1, core_count() // max(_tasks.get(), ranks.local_world_size()))


def usual_threads() -> int:
    """Default threads of a training step: one core is left for other processes.

    A step waits for its slowest thread: with one thread per core, another busy process makes it slower than a single
    thread.
    """
    return max(1, (core_count() - 1) // ranks.local_world_size())


def work_beside(tasks: int, function: Callable[[int], Result], number: int) -> Result:
    """`function(number)`, as one of `tasks` concurrent tasks on this machine."""
    before = _tasks.set(tasks)
    try:
        return function(number)
    finally:
        _tasks.reset(before)
