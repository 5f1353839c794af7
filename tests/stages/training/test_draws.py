"""What is drawn: epochs that see every row once, shares that make up the batch, streams that never meet."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from pipeline.errors import UsageError
from smalti.epoch import exact_order
from stages.training.draws import passes_of, rows_of_steps, share_of, stream, torch_seed


def test_an_epoch_sees_every_row_of_its_whole_batches_once() -> None:
    epoch = np.concatenate(list(islice(rows_of_steps(4, rows=23, batch=5, seed=1), 4)))
    assert len(set(epoch.tolist())) == 20
    np.testing.assert_array_equal(epoch, exact_order(23, seed=1, epoch=1)[:20])


def test_steps_may_begin_anywhere() -> None:
    whole = [rows_B.tolist() for rows_B in islice(rows_of_steps(0, rows=23, batch=5, seed=1), 11)]
    for first in range(11):
        rest = islice(rows_of_steps(first, rows=23, batch=5, seed=1), 11 - first)
        assert [rows_B.tolist() for rows_B in rest] == whole[first:]


def test_epochs_and_seeds_differ() -> None:
    orders = [
        next(rows_of_steps(step, rows=64, batch=64, seed=seed)).tolist() for step, seed in ((0, 0), (1, 0), (0, 1))
    ]
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_shares_make_up_the_batch(world: int) -> None:
    batch = np.arange(12)
    shares = [batch[share_of(12, rank=rank, world=world)] for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate(shares), batch)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match="batch 12 does not divide into equal shares of 5 processes"):
        share_of(12, rank=0, world=5)


@pytest.mark.parametrize(
    ("share", "rows_per_pass", "passes"),
    [(12, None, 1), (12, 12, 1), (12, 4, 3), (6, 4, 2), (12, 5, 3), (7, 4, 7), (3, 64, 1)],
)
def test_passes_are_equal_and_hold_at_most_so_many_rows(share: int, rows_per_pass: int | None, passes: int) -> None:
    assert passes_of(share, rows_per_pass) == passes


def test_a_stream_belongs_to_seed_name_and_step() -> None:
    first = stream(3, "views", 7).random(4)
    np.testing.assert_array_equal(first, stream(3, "views", 7).random(4))
    for other in (stream(4, "views", 7), stream(3, "labels", 7), stream(3, "views", 8)):
        assert not np.array_equal(first, other.random(4))


def test_torch_seeds_are_in_range_and_differ() -> None:
    seeds = {torch_seed(0, "step", step, rank) for step in range(50) for rank in range(4)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
