"""Codes predicted from nothing, or from the code before: two tables of counts.

K codes, B rows, T tokens
"""

from __future__ import annotations

import numpy as np


class Bigram:
    """Counts with one added to each, so that nothing is impossible."""

    def __init__(self, codes: int) -> None:
        self.singles_K = np.ones(codes)
        self.pairs_KK = np.ones((codes, codes))

    def count(self, codes_BT: np.ndarray) -> None:
        np.add.at(self.singles_K, codes_BT, 1)
        np.add.at(self.pairs_KK, (codes_BT[:, :-1], codes_BT[:, 1:]), 1)

    def bits_per_code(self, codes_BT: np.ndarray) -> tuple[float, float]:
        """Mean bits of a code: knowing nothing, and knowing the code before."""
        alone = self.singles_K / self.singles_K.sum()
        after = self.pairs_KK / self.pairs_KK.sum(axis=1, keepdims=True)
        following = after[codes_BT[:, :-1], codes_BT[:, 1:]]
        return float(-np.log2(alone[codes_BT]).mean()), float(-np.log2(following).mean())
