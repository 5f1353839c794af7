"""Shuffled epochs: every row once, the same order however it is read, and exact continuation."""

from __future__ import annotations

import logging

import numpy as np
import pytest

import smalti
from smalti.epoch import block_order, exact_order


def rows_of(epoch: smalti.Epoch) -> list[int]:
    return [row for rows_B, _, _ in epoch for row in rows_B.tolist()]


def test_batches_hold_their_rows(token_set, codes_ICT):
    flat = codes_ICT.reshape(150, 8)
    for rows_B, codes_BT, labels_B in token_set.epoch(16, seed=3, epoch=1, look_ahead=2):
        np.testing.assert_array_equal(codes_BT, flat[rows_B])
        np.testing.assert_array_equal(labels_B, rows_B // 3 % 10)
        assert len(rows_B) == 16


@pytest.mark.parametrize("look_ahead", [1, 3, 64])
@pytest.mark.parametrize("drop_last", [True, False])
def test_order_is_the_documented_permutation(token_set, look_ahead, drop_last):
    expected = np.random.Generator(np.random.Philox(key=np.array([7, 2], np.uint64))).permutation(150).tolist()
    epoch = token_set.epoch(16, seed=7, epoch=2, look_ahead=look_ahead, drop_last=drop_last)
    assert len(epoch) == (9 if drop_last else 10)
    assert rows_of(epoch) == expected[: 144 if drop_last else 150]
    assert len(epoch) == 0


def test_order_is_pinned():
    assert exact_order(10, seed=0, epoch=0).tolist() == [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]
    assert exact_order(10, seed=0, epoch=1).tolist() != exact_order(10, seed=1, epoch=0).tolist()


@pytest.mark.parametrize("world", [1, 2, 4, 16])
@pytest.mark.parametrize("shuffle", ["exact", "blocks"])
def test_any_world_size_gives_the_same_global_order(token_set, world, shuffle):
    whole = token_set.epoch(16, seed=1, epoch=0, drop_last=False, shuffle=shuffle)
    ranks = [
        token_set.epoch(16, seed=1, epoch=0, drop_last=False, rank=rank, world=world, shuffle=shuffle)
        for rank in range(world)
    ]
    for (rows_B, codes_BT, labels_B), *parts in zip(whole, *ranks, strict=True):
        np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), rows_B)
        np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), codes_BT)
        np.testing.assert_array_equal(np.concatenate([part[2] for part in parts]), labels_B)


@pytest.mark.parametrize("stop_after", [1, 4, 9])
def test_resumed_equals_uninterrupted(token_set, stop_after):
    whole = rows_of(token_set.epoch(16, seed=5, epoch=0, drop_last=False))
    interrupted = token_set.epoch(16, seed=5, epoch=0, look_ahead=3, drop_last=False)
    first = [row for _ in range(stop_after) for row in next(interrupted)[0].tolist()]
    assert interrupted.state == {"seed": 5, "epoch": 0, "start": 16 * stop_after}
    rest = rows_of(token_set.epoch(16, **interrupted.state, look_ahead=2, drop_last=False))
    assert first + rest == whole


def test_end_of_epoch_is_a_state(token_set):
    epoch = token_set.epoch(16, seed=5, epoch=0, drop_last=False)
    assert len(rows_of(epoch)) == epoch.position == 150
    assert rows_of(token_set.epoch(16, **epoch.state, drop_last=False)) == []


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_blocks_hold_every_row_once_and_neighbours_together(rows):
    order = block_order(rows, seed=2, epoch=3, window_rows=8, windows=2)
    assert sorted(order.tolist()) == list(range(rows))
    assert all(len(set((order[low : low + 16] // 8).tolist())) <= 3 for low in range(0, rows, 16))


def test_approximate_order_is_declared(token_set, caplog):
    with caplog.at_level(logging.WARNING, "smalti"):
        epoch = token_set.epoch(16, seed=0, epoch=0, shuffle="blocks", drop_last=False)
    assert not epoch.is_exact
    assert "approximate" in caplog.text
    assert sorted(rows_of(epoch)) == list(range(150))


def test_slow_exact_order_is_told(tmp_path, codes_ICT, caplog):
    found = smalti.create_tokens(
        tmp_path / "set",
        codes_ICT,
        labels=[0] * 50,
        codes=500,
        grid=(2, 4),
        name="t",
        profile="transport",
        chunk_images=4,
    )
    with caplog.at_level(logging.WARNING, "smalti"):
        rows_B, codes_BT, _ = next(found.epoch(150, seed=0, epoch=0))
    assert "cannot be mapped" in caplog.text
    np.testing.assert_array_equal(codes_BT, codes_ICT.reshape(150, 8)[rows_B])


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 0},
        {"look_ahead": 0},
        {"rank": 2, "world": 2},
        {"rank": -1},
        {"world": 3},
        {"start": -1},
        {"start": 151},
        {"seed": -1},
        {"shuffle": "some"},
    ],
    ids=str,
)
def test_impossible_requests_are_refused(token_set, changes):
    arguments = {"batch": 16, "seed": 0, "epoch": 0, **changes}
    with pytest.raises(smalti.UsageError):
        token_set.epoch(arguments.pop("batch"), **arguments)
