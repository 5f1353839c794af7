"""Usage of a codebook: codes in use and perplexity, from exact counts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class CodeUsage:
    """Counts of `codes` codes, added up block by block."""

    def __init__(self, codes: int, counts_K: NDArray[np.int64] | None = None):
        self.counts_K = np.zeros(codes, dtype=np.int64) if counts_K is None else counts_K

    def add(self, codes: NDArray[Any]) -> None:
        """Count codes of any shape, each in [0, codes)."""
        self.counts_K += np.bincount(codes.reshape(-1), minlength=len(self.counts_K))

    @property
    def used(self) -> int:
        return int(np.count_nonzero(self.counts_K))

    @property
    def perplexity(self) -> float:
        """Exponential of the entropy, from 1 to the number of codes; six decimals."""
        shares = self.counts_K[self.counts_K > 0] / max(1, int(self.counts_K.sum()))
        return round(float(np.exp(-(shares * np.log(shares)).sum())), 6)

    @property
    def sizes(self) -> dict[str, int]:
        """Counts of the rarest, the median and the commonest code."""
        ascending_K = np.sort(self.counts_K)
        return {
            "smallest": int(ascending_K[0]),
            "median": int(ascending_K[len(ascending_K) // 2]),
            "largest": int(ascending_K[-1]),
        }

    @property
    def sentence(self) -> str:
        return f"{self.used}/{len(self.counts_K)} codes used, perplexity {self.perplexity:.0f}"
