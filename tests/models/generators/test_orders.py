"""Orders and drops: scans, shares, permutations, and rows that do not depend on what was decided for others."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from models.generators.orders import Scan, draw_drops, draw_orders, scan_order

RASTER = scan_order("raster", (4, 4))
SEVEN = np.arange(7)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


@pytest.mark.parametrize(
    ("scan", "steps"),
    [
        ("raster", [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]),
        ("alternate", [[0, 1, 2, 3], [7, 6, 5, 4], [8, 9, 10, 11], [15, 14, 13, 12]]),
        ("z-curve", [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]),
        ("subsample", [[0, 4, 1, 5], [8, 12, 9, 13], [2, 6, 3, 7], [10, 14, 11, 15]]),
        ("spiral-in", [[0, 1, 2, 3], [11, 12, 13, 4], [10, 15, 14, 5], [9, 8, 7, 6]]),
        ("spiral-out", [[15, 14, 13, 12], [4, 3, 2, 11], [5, 0, 1, 10], [6, 7, 8, 9]]),
    ],
)
def test_scans(scan: Scan, steps: list[list[int]]) -> None:
    """steps: at which step each position of the grid is laid."""
    assert np.argsort(scan_order(scan, (4, 4))).reshape(4, 4).tolist() == steps


@pytest.mark.parametrize("scan", get_args(Scan))
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (5, 2), (1, 6)])
def test_scans_of_any_grid_lay_each_position_once(scan: Scan, grid: tuple[int, int]) -> None:
    assert sorted(scan_order(scan, grid).tolist()) == list(range(grid[0] * grid[1]))


def test_every_row_is_a_permutation() -> None:
    orders = draw_orders(rng(), 200, SEVEN, 0.5)
    assert orders.dtype == np.int64
    assert (np.sort(orders, axis=1) == SEVEN).all()


def test_the_ratio_is_the_share_of_permuted_rows() -> None:
    scan_T = scan_order("spiral-in", (4, 4))
    assert (draw_orders(rng(), 50, scan_T, 0.0) == scan_T).all()
    permuted = (draw_orders(rng(), 2000, scan_T, 0.3) != scan_T).any(axis=1)
    assert abs(permuted.mean() - 0.3) < 0.05
    assert (draw_orders(rng(), 200, RASTER, 1.0) != RASTER).any(axis=1).all()


def test_permutations_are_uniform() -> None:
    orders = draw_orders(rng(), 6000, np.arange(3), 1.0)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6
    assert abs(counts - 1000).max() < 150  # five standard deviations are 144


def test_the_stream_is_used_up_alike_whatever_the_ratio() -> None:
    first, second = rng(), rng()
    draw_orders(first, 8, SEVEN, 0.0)
    draw_orders(second, 8, SEVEN, 1.0)
    assert first.random() == second.random()


def test_drops() -> None:
    assert not draw_drops(rng(), 100, 0.0).any()
    assert draw_drops(rng(), 100, 1.0).all()
    assert abs(draw_drops(rng(), 5000, 0.1).mean() - 0.1) < 0.025
