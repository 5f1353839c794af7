"""The part of a training step's batch that a forward pass sees, with gradient accumulation or several processes."""

from __future__ import annotations

from typing import NamedTuple


class BatchPart(NamedTuple):
    """One of the equal parts of a step's batch; by default all of it.

    A batch is shared between `world` processes in the order of their ranks, and each cuts its share into `pieces`.
    """

    piece: int = 0
    pieces: int = 1
    rank: int = 0
    world: int = 1

    @property
    def number(self) -> int:
        return self.rank * self.pieces + self.piece

    @property
    def count(self) -> int:
        return self.world * self.pieces

    @property
    def is_last(self) -> bool:
        """Whether this process has no further piece in this step."""
        return self.piece + 1 == self.pieces
