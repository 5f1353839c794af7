"""What a training supplies to the engine: networks, batches, losses; and what it may say on the way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from stages.training.config import Optimizer, Schedule

Batch = tuple[Tensor, ...]
Modules = Mapping[str, nn.Module]


class Losses(NamedTuple):
    """losses: weighted, named scalars whose sum is minimised.  stats: named scalars without gradient, for the log."""

    losses: dict[str, Tensor]
    stats: dict[str, Tensor]


def is_matrix(name: str, parameter: Tensor) -> bool:
    """The usual choice of what decays: weights, but neither biases nor the gains of norms."""
    return parameter.ndim >= 2


@dataclass
class Part:
    """A module and the optimizer that trains it. A training with a discriminator has two.

    module: its forward is what replicas run, so losses are computed through it.
    is_decayed: which named parameters weight decay applies to.  first_step: before it, the part rests.
    """

    name: str
    module: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    is_decayed: Callable[[str, Tensor], bool] = field(default=is_matrix)
    first_step: int = 0


class Task(ABC):
    """One kind of training. The parts are stepped in their order, in every step."""

    parts: list[Part]
    rows: int
    """Rows of the data; a step's batch is a choice of them."""
    unit: str = "images"
    reads_ahead: bool = False
    """True if a batch takes time to read (decoding): a thread then reads the next ones meanwhile."""

    @abstractmethod
    def batch(self, step: int, rows_B: NDArray[np.int64], share: slice) -> Batch:
        """CPU tensors of this process's share of a step's global batch, first axis = rows; drawn by (seed, step)."""

    @abstractmethod
    def losses(self, part: str, modules: Modules, batch: Batch, step: int) -> Losses:
        """Losses of one part, computed through `modules` (the parts' modules by name, wrapped for replicas)."""

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data, of the parts' modules in evaluation mode; "loss" is what `select: best` compares."""
        return {}

    def warning(self, step: int, stats: Mapping[str, Any]) -> str | None:
        """A sentence of advice if what is logged looks bad."""
        return None
