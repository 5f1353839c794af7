"""Which codes of an image are masked, in a training step and in the iterations of sampling (MaskGIT, arXiv 2202.04200), in numpy.

The functions that draw do so for a whole global batch, so a row depends on (stream, index in the global batch) alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LARGEST_PIECE = 2**24  # logits that codes are drawn from at once; float64 copies of them are made
GOLDEN_RATIO = (1 + 5**0.5) / 2
Masks_BT = NDArray[np.bool_]


def draw_masks(rng: np.random.Generator, batch: int, tokens: int) -> Masks_BT:
    """True where a code is masked, (batch, tokens): a share of cos(pi u / 2), u uniform, at random positions."""
    return masks_of(rng.random(batch), rng.random((batch, tokens)))


def masks_of(ratios_B: NDArray[np.floating], scores_BT: NDArray[np.floating]) -> Masks_BT:
    """From uniforms: the codes with the lowest scores are masked, at least one of them and at most all."""
    tokens = scores_BT.shape[1]
    masked_B = np.minimum(np.floor(tokens * np.cos(np.pi / 2 * ratios_B)) + 1, tokens)
    ranks_BT = scores_BT.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return ranks_BT < masked_B[:, None]


def even_mask(tokens: int) -> NDArray[np.bool_]:
    """A deterministic mask, (tokens,): evenly spread, of the mean share of drawn masks, 2 / pi."""
    return np.arange(1, tokens + 1) / GOLDEN_RATIO % 1 < 2 / np.pi


def masked_after(iterations: int, tokens: int) -> list[int]:
    """Number of masked codes after each iteration of sampling: it falls as a cosine, by at least one, to 0 after the last."""
    counts, before = [], tokens
    for done in range(1, iterations):
        before = max(min(int(tokens * np.cos(np.pi / 2 * done / iterations)), before - 1), 1)
        counts.append(before)
    return [*counts, 0]
