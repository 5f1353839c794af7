"""Which of several processes this one is, as `torchrun` and `accelerate launch` tell it (no torch here).

Rank 0 alone takes locks, writes drafts and logs. The others compute with it, and follow what it finishes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from pipeline.errors import UsageError

POLL_SECONDS = 0.2


def rank() -> int:
    return _number("RANK", 0)


def world_size() -> int:
    return _number("WORLD_SIZE", 1)


def is_first() -> bool:
    return rank() == 0


def wait_until(is_there: Callable[[], bool]) -> None:
    """Wait for what rank 0 makes. Should rank 0 die, the launcher ends this process."""
    while not is_there():
        time.sleep(POLL_SECONDS)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(f"the environment variable {name} is {text!r}, expected a number") from error
