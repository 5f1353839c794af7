"""The orders in which the codes of an image are generated, and random orders and label drops of training, in numpy.

The functions that draw do so for a whole global batch and consume the same amount of the stream whatever they decide, so
a row depends on (stream, index in the global batch) alone and each process takes its own rows.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Scan = Literal["raster", "z-curve", "subsample", "alternate", "spiral-in", "spiral-out"]
Order_T = npt.NDArray[np.int64]


def scan_order(scan: Scan, grid: tuple[int, int]) -> Order_T:
    """The position in raster order that each step generates, (rows * columns,).

    alternate: every other row from right to left.  z-curve: quarter by quarter, and each quarter likewise (Morton codes).
    subsample: a coarse grid of every 2nd, 4th, ... row and column first, then what lies between.  spiral-in: around from
    the upper left corner inwards; spiral-out: the same backwards.
    """
    places_hw = np.arange(grid[0] * grid[1], dtype=np.int64).reshape(grid)
    if scan == "alternate":
        places_hw[1::2] = places_hw[1::2, ::-1]
    elif scan in ("z-curve", "subsample"):
        return np.argsort(_interleaved(grid, coarse_first=scan == "z-curve"), axis=None, kind="stable")
    elif scan in ("spiral-in", "spiral-out"):
        inwards_T = _peel(places_hw)
        return inwards_T if scan == "spiral-in" else inwards_T[::-1].copy()
    return places_hw.reshape(-1)


def _interleaved(grid: tuple[int, int], *, coarse_first: bool) -> npt.NDArray[np.int64]:
    """The interleaved bits of row and column, (rows, columns); the highest bits are most significant, or the lowest."""
    rows_h1, columns_1w = np.ogrid[: grid[0], : grid[1]]
    bits = max(grid).bit_length()
    keys_hw = np.zeros(grid, np.int64)
    for bit in reversed(range(bits)) if coarse_first else range(bits):
        keys_hw = keys_hw << 2 | (rows_h1 >> bit & 1) << 1 | columns_1w >> bit & 1
    return keys_hw


def _peel(places_hw: npt.NDArray[np.int64]) -> Order_T:
    parts = []
    while places_hw.size:
        parts.append(places_hw[0])
        places_hw = np.rot90(places_hw[1:])
    return np.concatenate(parts)


def draw_orders(rng: np.random.Generator, batch: int, scan_T: Order_T, ratio: float) -> npt.NDArray[np.int64]:
    """A uniform random permutation with probability `ratio`, else the order `scan_T`, for each row: (batch, tokens)."""
    permuted = rng.random(batch) < ratio
    permutations = np.argsort(rng.random((batch, len(scan_T))), axis=1, kind="stable")
    return np.where(permuted[:, None], permutations, scan_T)


def draw_drops(rng: np.random.Generator, batch: int, rate: float) -> npt.NDArray[np.bool_]:
    """Which labels are dropped, each with probability `rate`: (batch,) booleans."""
    return rng.random(batch) < rate
