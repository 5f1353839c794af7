"""The interface of a training to the engine: networks, batches, losses, evaluation, logs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from models.batch_part import BatchPart
from stages.training.config import Optimizer, Schedule
from stages.training.replicas import Replicas

Batch = Mapping[str, Tensor]
"""Tensors by name; the first axis of each is rows."""
Modules = Mapping[str, nn.Module]


class Losses(NamedTuple):
    """losses: weighted, named scalars whose sum is minimised.  stats: named scalars without gradient, for the log."""

    losses: dict[str, Tensor]
    stats: dict[str, Tensor]


def is_matrix(name: str, parameter: Tensor) -> bool:
    """The usual choice for weight decay: weights, but neither biases nor the gains of norms."""
    return parameter.ndim >= 2


@dataclass
class Part:
    """A module and the optimizer that trains it. A training with a discriminator has two.

    module: its forward is what replicas run, so losses are computed through it.
    is_decayed: which named parameters weight decay applies to.  goes_first: within a step it comes before the main part.
    """

    name: str
    module: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    is_decayed: Callable[[str, Tensor], bool] = field(default=is_matrix)
    goes_first: bool = False


class Task(ABC):
    """One kind of training. All parts are stepped in every step, in their order, after those that go first."""

    parts: list[Part]
    """The first is the main one: it makes the pass that all share, and its loss is the one that is shown."""
    rows: int
    """Rows of the data; a step's batch is a choice of them."""
    epoch_images: int = 0
    """Images of the data, in which epochs are counted, where they are other than rows."""
    judged_rows: int = 0
    """Rows on which `evaluate` measures the result."""
    unit: str = "images"
    reads_ahead: bool = False
    """True if a batch takes time to read (decoding): a thread then reads the next ones meanwhile."""
    shown: tuple[str, ...] = ()
    """Losses and stats that progress shows beside the loss, as they were when last logged."""
    draws_every: int = 0
    """Steps between drawings; 0: none."""
    part: BatchPart = BatchPart()
    """Which part of the step's batch the next pass or losses are of; the engine sets it."""
    replicas: Replicas
    """All processes of the training, which the engine sets: evaluations and drawings are shared between them."""

    def read(self, rows_of_batches: Iterator[NDArray[np.int64]], share: slice) -> Iterator[Any]:
        """What belongs to the rows of each global batch that comes, or to this process's share of them; here their numbers."""
        return rows_of_batches

    @abstractmethod
    def batch(self, step: int, data: Any, share: slice) -> Batch:
        """CPU tensors of this process's share of a step's global batch, first axis = rows; drawn by (seed, step).

        data: what `read` gave, by default the numbers (B,) of all rows of the global batch.
        """

    def survey(self, pieces: Sequence[Batch]) -> None:  # noqa: B027 - most tasks do not need it
        """See all pieces of this process's share of a batch, before the passes over them are made one by one."""

    def shared_pass(self, modules: Modules, batch: Batch, step: int) -> Any:
        """What the losses of all parts of a step are computed from; here the batch itself.

        It has the gradient of the main part, which the losses of other parts leave alone (`detach`). Called twice from
        the same buffers and random numbers, it must give the same.
        """
        return batch

    @abstractmethod
    def losses(self, part: str, modules: Modules, batch: Any, step: int) -> Losses:
        """Losses of one part, from what `shared_pass` gave.

        modules: the parts' modules by name, wrapped for replicas.
        """

    def replicated(self) -> Mapping[str, Tensor]:
        """Tensors that are changed other than by their optimizer, and yet must be the same in all processes."""
        return {}

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data, of the parts' modules in evaluation mode; "loss" is what `select: best` compares."""
        return {}

    def draw(self, step: int) -> Mapping[str, bytes]:
        """Files for the log, such as grids of images, of the modules in evaluation mode; the first process writes them.

        step: steps that are done.  Every process is asked, and does its share, so that none waits for another.
        """
        return {}

    def warning(self, step: int, stats: Mapping[str, Any]) -> str | None:
        """A sentence of advice if what is logged looks bad."""
        return None
