"""Shards on the processes of a launch: one dask cluster, whose scheduler and client are process 0.

It starts with the first shards. Every process of the launch works for it in a thread of its own, so that a device is used
by the process to which the launcher gave it; process 0 may start local worker processes instead of its own thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline import ranks
from pipeline.cluster import Dask, Outcomes, Say, silence_dask
from pipeline.followers import Followers

END_SECONDS = 2.0


class Launched:
    """A cluster of this process and all followers. workers: local processes that work in the place of this one, if any."""

    def __init__(self, followers: Followers, *, workers: int, around: ExitStack):
        self._followers, self._workers, self._around = followers, workers, around
        self._started: Dask | None = None

    def map(self, function: Callable[[int], Any], numbers: Iterable[int], *, folder: Path, say: Say) -> Outcomes:
        waiting = list(numbers)
        if waiting:
            yield from self._cluster().map(function, waiting, folder=folder, say=say)

    def _cluster(self) -> Dask:
        if self._started is None:
            self._started = Dask(self._around.enter_context(_scheduler(self._workers)))
            self._followers.work_for(int(self._started.client.scheduler.address.rpartition(":")[2]))
        return self._started


@contextmanager
def launched(followers: Followers, *, workers: int) -> Iterator[Launched]:
    with ExitStack() as around:
        yield Launched(followers, workers=workers, around=around)


@contextmanager
def working_for(scheduler: str) -> Iterator[None]:
    """Within this block a thread of this process works for a dask scheduler; it ends with the scheduler."""
    silence_dask()
    with TemporaryDirectory() as folder:
        thread = threading.Thread(target=lambda: asyncio.run(_work(scheduler, folder)), name="shards", daemon=True)
        thread.start()
        try:
            yield
        finally:
            thread.join(END_SECONDS)


async def _work(scheduler: str, folder: str) -> None:
    from dask.distributed import Worker

    worker: Any = Worker(scheduler, nthreads=1, memory_limit=0, local_directory=folder, dashboard=False)
    async with worker:
        await worker.finished()


@contextmanager
def _scheduler(workers: int) -> Iterator[Any]:
    """A client of a scheduler that processes on other machines reach, with the workers of this process."""
    from dask.distributed import Client, LocalCluster

    silence_dask()
    own = {"n_workers": workers} if workers else {"n_workers": 1, "processes": False, "memory_limit": 0}
    host = "127.0.0.1" if ranks.meeting().is_one_host else "0.0.0.0"
    with (
        LocalCluster(
            **own, threads_per_worker=1, protocol="tcp://", host=host, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client
