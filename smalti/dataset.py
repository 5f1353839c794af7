"""A token set as a map-style dataset. It needs no torch, and torch's DataLoader takes it as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from smalti.tokens import TokenSet

Item = tuple[NDArray[np.int64], int]


class TokenDataset:
    """Items are (codes_T int64, label). Ask for many at once: `__getitems__` gathers them together."""

    def __init__(self, token_set: TokenSet) -> None:
        self.token_set = token_set

    def __len__(self) -> int:
        return len(self.token_set)

    def __getitem__(self, row: int) -> Item:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} is outside of {self.token_set.path}, which has {len(self)}")
        return self.__getitems__([row % len(self)])[0]

    def __getitems__(self, rows: list[int]) -> list[Item]:
        codes_BT, labels_B = self.batch(rows)
        return list(zip(codes_BT, labels_B.tolist(), strict=True))

    def batch(self, rows: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Codes (B, T) and labels (B,) as int64, what an embedding wants."""
        return self.token_set.codes_of(rows).astype(np.int64), self.token_set.labels_of(rows).astype(np.int64)
