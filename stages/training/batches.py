"""The batches of a training, in the order of its steps."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from stages.training.config import TrainingConfig
from stages.training.draws import rows_of_step, share_of
from stages.training.replicas import Replicas
from stages.training.task import Batch, Task

READ_AHEAD = 2


def read_batches(task: Task, config: TrainingConfig, replicas: Replicas, first: int) -> Iterator[Batch]:
    """This process's share of every batch from step `first` on; read ahead by a thread where reading takes time."""
    share = share_of(config.batch, rank=replicas.rank, world=replicas.world)

    def read(step: int) -> Batch:
        rows_B = rows_of_step(step, rows=task.rows, batch=config.batch, seed=config.seed)
        return task.batch(step, rows_B, share)

    if not task.reads_ahead:
        yield from map(read, range(first, config.steps))
        return
    with ThreadPoolExecutor(1) as reader:
        coming = [reader.submit(read, step) for step in range(first, min(first + READ_AHEAD, config.steps))]
        try:
            for step in range(first, config.steps):
                batch = coming.pop(0).result()
                if step + READ_AHEAD < config.steps:
                    coming.append(reader.submit(read, step + READ_AHEAD))
                yield batch
        finally:
            reader.shutdown(cancel_futures=True)
