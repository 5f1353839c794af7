"""What chance decides in a RAR training step, drawn with numpy outside of the network.

Each function draws for a whole global batch and uses up the same amount of the stream whatever it decides, so a row
depends on (stream, index in the global batch) alone and a process takes the rows that are its own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def raster(batch: int, tokens: int) -> npt.NDArray[np.int64]:
    """The order 0, 1, 2, ... for each of `batch` rows: (batch, tokens)."""
    return np.tile(np.arange(tokens, dtype=np.int64), (batch, 1))


def draw_orders(rng: np.random.Generator, batch: int, tokens: int, ratio: float) -> npt.NDArray[np.int64]:
    """A uniform random permutation with probability `ratio`, else the raster order, for each row: (batch, tokens)."""
    permuted = rng.random(batch) < ratio
    permutations = np.argsort(rng.random((batch, tokens)), axis=1, kind="stable")
    return np.where(permuted[:, None], permutations, raster(batch, tokens))


def draw_drops(rng: np.random.Generator, batch: int, rate: float) -> npt.NDArray[np.bool_]:
    """Which labels are dropped, each with probability `rate`: (batch,) booleans."""
    return rng.random(batch) < rate
