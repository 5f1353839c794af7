"""The batches of a training in the order of its steps, and the passes over one that all parts share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from stages.training.config import TrainingConfig
from stages.training.draws import rows_of_steps, share_of
from stages.training.replicas import Replicas
from stages.training.task import Batch, Task

READ_AHEAD = 2


def read_batches(task: Task, config: TrainingConfig, replicas: Replicas, first: int) -> Iterator[Batch]:
    """This process's share of every batch from step `first` on; read ahead by a thread where reading takes time."""
    share = share_of(config.batch, rank=replicas.rank, world=replicas.world)
    rows_of_batches = rows_of_steps(first, rows=task.rows, batch=config.batch, seed=config.seed)
    data = task.read(islice(rows_of_batches, config.steps - first), share)
    batches = (task.batch(step, found, share) for step, found in enumerate(data, first))
    if not task.reads_ahead:
        yield from batches
        return
    with ThreadPoolExecutor(1) as reader:
        coming = [reader.submit(next, batches, None) for _ in range(READ_AHEAD)]
        try:
            while (batch := coming.pop(0).result()) is not None:
                coming.append(reader.submit(next, batches, None))
                yield batch
        finally:
            reader.shutdown(cancel_futures=True)


Buffers = list[tuple[nn.Module, str, Tensor]]


class SharedPasses:
    """SharedPasses over the pieces of one batch.

    A batch of one piece has one pass, with gradient, which all parts share. With several pieces only one graph may exist
    at a time: parts before the main part get passes without graph, the main part computes them again, and parts after it
    get the results.

    make: the pass over one piece.  begin_again: restores buffers to the begin of the step; the caller seeds random
    numbers before every pass.
    """

    def __init__(self, pieces: list[Batch], make: Callable[[Batch], Any], *, begin_again: Callable[[], None]):
        self._pieces = pieces
        self._make = make
        self._begin_again = begin_again
        self._kept: dict[int, Any] = {}
        self._was_previewed = False

    def __len__(self) -> int:
        return len(self._pieces)

    def take(self, number: int, *, is_main: bool, is_kept: bool) -> Any:
        """The pass over one piece, for the main part or another; is_kept: another part needs it later."""
        if number in self._kept:
            return self._kept[number]
        if not is_main and len(self) > 1:
            self._was_previewed = True
            with torch.no_grad():
                return self._make(self._pieces[number])
        if self._was_previewed:
            self._was_previewed = False
            self._begin_again()
        made = self._make(self._pieces[number])
        if is_kept:
            self._kept[number] = made
        return made


def copy_buffers(module: nn.Module) -> Buffers:
    """Copies of all buffers of a module."""
    return [(module, name, one.clone()) for name, one in module.named_buffers()]


def put_buffers(buffers: Buffers) -> None:
    """Set them back."""
    for module, name, before in buffers:
        module.get_buffer(name).copy_(before)
