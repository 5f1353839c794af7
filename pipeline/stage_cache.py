"""What a process makes once for all shards of a stage, and gives back when the stage ends: networks, caches, opened data.

`cached` remembers results; `give_back` forgets those of the whole process. The runner calls it when a stage ends, in its
own process and in those that train beside it; a dask worker calls it when a map begins there and when it ends.
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
    """Call the function whenever results were forgotten: what they held may still be somebody's, such as a device's."""
    _afterwards.append(function)
    return function


def give_back() -> None:
    """Forget all results. What a running shard holds is its own until it ends; whoever asks again makes it anew."""
    for forget in _forgets:
        forget()
    for afterwards in _afterwards:
        afterwards()
