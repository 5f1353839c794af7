"""A random choice of rows: those of the smallest hash(seed, row), independent of the order of reading.

The hash is the finalizer of splitmix64 (Steele, Lea, Flood 2014), a bijection of the row, so that there are no ties.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROWS_AT_ONCE = 2**22
MASK = 2**64 - 1


def smallest_rows(rows: int, keep: int, *, seed: int, stream: int = 0) -> NDArray[np.int64]:
    """The `keep` rows of 0..rows-1 with the smallest hash, in ascending order; all rows if there are fewer.

    stream: another number gives an independent choice for the same seed.
    """
    if keep >= rows:
        return np.arange(rows, dtype=np.int64)
    found = np.empty(0, dtype=np.uint64)
    for start in range(0, rows, ROWS_AT_ONCE):
        candidates = np.concatenate([found, np.arange(start, min(start + ROWS_AT_ONCE, rows), dtype=np.uint64)])
        if len(candidates) > keep:
            order = np.argpartition(hash_rows(candidates, seed=seed, stream=stream), keep - 1)
            candidates = candidates[order[:keep]]
        found = candidates
    return np.sort(found).astype(np.int64)


def hash_rows(rows: NDArray[np.uint64], *, seed: int, stream: int = 0) -> NDArray[np.uint64]:
    """uint64 (N,): a hash of (seed, stream, row)."""
    key = _mix(_mix(np.array([seed & MASK], np.uint64)) ^ np.uint64(stream))
    return _mix(rows ^ key)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed = values + np.uint64(0x9E3779B97F4A7C15)  # uint64 arrays wrap around
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
