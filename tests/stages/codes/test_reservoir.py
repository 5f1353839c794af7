"""The choice of rows: a property of (seed, row) alone."""

from __future__ import annotations

import numpy as np
import pytest

from stages.codes import reservoir
from stages.codes.reservoir import hash_rows, smallest_rows


def test_takes_the_rows_of_smallest_hash() -> None:
    hashes = hash_rows(np.arange(1000, dtype=np.uint64), seed=3)
    assert smallest_rows(1000, 40, seed=3).tolist() == sorted(np.argsort(hashes)[:40].tolist())


def test_reading_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = smallest_rows(1000, 40, seed=3)
    monkeypatch.setattr(reservoir, "ROWS_AT_ONCE", 64)
    np.testing.assert_array_equal(smallest_rows(1000, 40, seed=3), whole)


def test_a_longer_list_keeps_what_stays_small() -> None:
    """Rows that are added later only push others out."""
    short, long = set(smallest_rows(1000, 40, seed=0).tolist()), set(smallest_rows(2000, 40, seed=0).tolist())
    assert {row for row in long if row < 1000} <= short


def test_keeps_all_of_a_short_list() -> None:
    assert smallest_rows(7, 7, seed=0).tolist() == list(range(7))


def test_hash_is_splitmix64_of_the_seed_stream_and_row() -> None:
    """The first value of the published generator with state 0; no two rows collide; seeds and streams differ."""
    assert int(reservoir._mix(np.zeros(1, np.uint64))[0]) == 0xE220A8397B1DCDAF
    rows = np.arange(100_000, dtype=np.uint64)
    hashes = {tuple(hash_rows(rows, seed=seed, stream=stream)[:4]) for seed in range(3) for stream in range(3)}
    assert len(hashes) == 9
    assert len(np.unique(hash_rows(rows, seed=0))) == len(rows)


def test_choice_is_even() -> None:
    chosen = smallest_rows(100_000, 10_000, seed=5)
    counts = np.bincount(chosen // 10_000, minlength=10)
    assert counts.min() > 850
    assert counts.max() < 1150
