"""A cache per process for the shards of a stage: networks, opened data, cleared when the stage ends.

`cached` remembers results; `give_back` clears all caches of the process. The runner calls it when a stage ends, in all
processes of a training; a dask worker calls it when a map begins and when it ends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_forgets: list[Callable[[], None]] = []
_afterwards: list[Callable[[], None]] = []


def cached(most: int) -> Callable[[Function], Function]:
    """Remember the last `most` results of a function, by its arguments, until the stage ends."""

    def keep(function: Function) -> Function:
        remembering: Any = lru_cache(most)(function)
        _forgets.append(remembering.cache_clear)
        return remembering  # type: ignore[no-any-return]

    return keep


def after_giving_back(function: Callable[[], None]) -> Callable[[], None]:
    """Call the function after caches were cleared, for example to return memory to a device."""
    _afterwards.append(function)
    return function


def give_back() -> None:
    """Clear all caches. A running shard keeps its references until it ends."""
    for forget in _forgets:
        forget()
    for afterwards in _afterwards:
        afterwards()
