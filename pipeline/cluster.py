"""Where shards run: in this process, on local dask workers, or on any dask cluster that already runs.

All three give the same results, since a shard depends on its number alone. A task is tried `TRIES` times; an error of
our own family is a statement about the data and is not tried again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from pipeline.errors import SmaltiError, StorageError, UsageError, WorkerError

TRIES = 3
POLL_SECONDS = 5.0
DESERTED_SECONDS = 60.0

Result = TypeVar("Result")
Outcome = tuple[int, Any]


class Cluster(Protocol):
    """Runs `function(number)` for every number and yields (number, result or exception) in the order of completion."""

    def map(self, function: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Outcome]: ...


class InProcess:
    """One shard after the other, here."""

    def map(self, function: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Outcome]:
        for number in numbers:
            yield number, _attempt(function, number)


class Dask:
    """Workers of a dask client; at most two shards per worker thread are in flight, so memory stays bounded."""

    def __init__(self, client: Any):
        self.client = client

    def map(self, function: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Outcome]:
        waiting = iter(numbers)
        futures = {self._submit(function, number): number for number in _take(waiting, self._slots())}
        while futures:
            for future in self._finished(list(futures)):
                number = futures.pop(future)
                yield number, _outcome(future, number)
                for following in _take(waiting, 1):
                    futures[self._submit(function, following)] = following

    def _finished(self, futures: list[Any]) -> list[Any]:
        """Those that are done, once there is one. A cluster without scheduler or workers is told, not waited for."""
        from dask.distributed import CancelledError, wait

        deserted = 0.0
        while True:
            try:
                return list(wait(futures, timeout=POLL_SECONDS, return_when="FIRST_COMPLETED").done)
            except TimeoutError:
                deserted = 0.0 if self._has_workers() else deserted + POLL_SECONDS
            except CancelledError as error:
                raise _lost() from error
            if deserted >= DESERTED_SECONDS:
                raise WorkerError(
                    f"no worker has been left on the dask cluster for {deserted:.0f} s",
                    hint="start workers with `dask worker` and run the same command again: finished shards are kept",
                )

    def _has_workers(self) -> bool:
        try:
            return bool(self.client.nthreads())
        except (OSError, RuntimeError) as error:  # what dask raises for a connection that is gone
            raise _lost() from error

    def _submit(self, function: Callable[[int], Any], number: int) -> Any:
        return self.client.submit(_attempt, function, number, pure=False)

    def _slots(self) -> int:
        return max(2, 2 * int(sum(self.client.nthreads().values())))


@contextmanager
def connect(*, workers: int = 0, scheduler: str | None = None) -> Iterator[Cluster]:
    """Yield the cluster that the command line asks for.

    workers: local dask processes (0: in this process).  scheduler: address of a dask scheduler, such as tcp://host:8786.
    """
    if workers and scheduler:
        raise UsageError("--workers starts a local cluster and --scheduler uses another: give one of them")
    if workers < 0:
        raise UsageError(f"--workers must be 0 or more, found {workers}")
    if not workers and not scheduler:
        yield InProcess()
        return
    with _client(workers, scheduler) as client:
        yield Dask(client)


@contextmanager
def _client(workers: int, scheduler: str | None) -> Iterator[Any]:
    import dask
    from dask.distributed import Client, LocalCluster

    dask.config.set({"distributed.scheduler.allowed-failures": TRIES})
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # we say it in our words
    if scheduler:
        try:
            client = Client(scheduler, timeout=20)
        except (OSError, ValueError) as error:
            raise StorageError(
                f"no dask scheduler answers at {scheduler}", hint="start one with `dask scheduler`"
            ) from error
        with client:
            yield client
        return
    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as local,
        Client(local) as client,
    ):
        yield client


def _attempt(function: Callable[[int], Any], number: int) -> Any:
    """The result of `function(number)`, or the exception of its last try as a value."""
    failure: Exception | None = None
    for _ in range(TRIES):
        try:
            return function(number)
        except SmaltiError as error:
            return error
        except Exception as error:
            failure = error
    return failure


def _lost() -> StorageError:
    return StorageError(
        "the connection to the dask scheduler is lost",
        hint="start it again and run the same command: finished shards are kept",
    )


def _outcome(future: Any, number: int) -> Any:
    try:
        return future.result()
    except Exception as error:  # the worker died too often, or the result could not travel
        return WorkerError(f"the worker of shard {number} kept dying ({type(error).__name__})")


def _take(numbers: Iterator[int], count: int) -> list[int]:
    return [number for _, number in zip(range(count), numbers, strict=False)]
