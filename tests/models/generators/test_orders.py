"""Orders and drops: shares, permutations, and rows that do not depend on what was decided for others."""

from __future__ import annotations

import numpy as np

from models.generators.orders import draw_drops, draw_orders, raster


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def test_every_row_is_a_permutation() -> None:
    orders = draw_orders(rng(), 200, 7, 0.5)
    assert orders.dtype == np.int64
    assert (np.sort(orders, axis=1) == raster(200, 7)).all()


def test_the_ratio_is_the_share_of_permuted_rows() -> None:
    assert (draw_orders(rng(), 50, 7, 0.0) == raster(50, 7)).all()
    permuted = (draw_orders(rng(), 2000, 16, 0.3) != raster(2000, 16)).any(axis=1)
    assert abs(permuted.mean() - 0.3) < 0.05
    assert (draw_orders(rng(), 200, 16, 1.0) != raster(200, 16)).any(axis=1).all()


def test_permutations_are_uniform() -> None:
    orders = draw_orders(rng(), 6000, 3, 1.0)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6
    assert abs(counts - 1000).max() < 150  # five standard deviations are 144


def test_the_stream_is_used_up_alike_whatever_the_ratio() -> None:
    first, second = rng(), rng()
    draw_orders(first, 8, 5, 0.0)
    draw_orders(second, 8, 5, 1.0)
    assert first.random() == second.random()


def test_drops() -> None:
    assert not draw_drops(rng(), 100, 0.0).any()
    assert draw_drops(rng(), 100, 1.0).all()
    assert abs(draw_drops(rng(), 5000, 0.1).mean() - 0.1) < 0.025
