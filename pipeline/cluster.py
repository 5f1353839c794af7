"""Clusters run shards: in this process, on local dask workers, or on an existing dask cluster.

All give the same results, since a shard depends on its number alone. After an I/O error or the loss of its worker a shard
is tried again, `TRIES` times in all, on any free worker. Other errors are not retried.
A dask worker, also one that joins later, is used after a check that it reads and writes the folder of the results
(`pipeline.shared_folder`).
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from traceback import extract_tb, format_exception
from typing import Any, Literal, Protocol

from pipeline import ranks, shared_folder
from pipeline.cores import work_beside
from pipeline.errors import CannotWrite, MemoryExhausted, SmaltiError, StorageError, UsageError, WorkerError
from pipeline.stage_cache import give_back

TRIES = 3
POLL_SECONDS = 1.0
SILENT_SECONDS = 2.0
DESERTED_SECONDS = 60.0
RESULT_SECONDS = 30.0
FORGET_SECONDS = 5.0
CONNECT_SECONDS = 20.0

Outcome = tuple[int, Any]
Outcomes = Generator[Outcome, None, None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Failure:
    """The error of a shard, instead of a result.

    verdict: "retry" a transient error (I/O, a lost worker), "name" an error in the shard's data, "stop" an error that
    concerns all shards.  traceback: of an error that is not a SmaltiError, else empty.
    """

    error: SmaltiError
    verdict: Literal["retry", "name", "stop"]
    traceback: str = ""


class Cluster(Protocol):
    """Runs `function(number)` for every number, yields (number, result or Failure) in the order of completion.

    folder: where the function writes.  say: prints a line, on waiting and on workers that are not used.
    """

    def map(self, function: Callable[[int], Any], numbers: Iterable[int], *, folder: Path, say: Say) -> Outcomes: ...


class InProcess:
    """One shard after the other, in this process."""

    def map(self, function: Callable[[int], Any], numbers: Iterable[int], *, folder: Path, say: Say) -> Outcomes:
        queue = _Queue(numbers)
        while queue.waiting:
            number = queue.waiting.popleft()
            yield from queue.settle(number, attempt(function, number))


class Dask:
    """Workers of a dask client; each thread has one shard at a time, so memory stays bounded."""

    def __init__(self, client: Any):
        self.client = client
        self.named: set[str] = set()
        """Workers, or hosts of workers, that were reported as not used."""

    def map(self, function: Callable[[int], Any], numbers: Iterable[int], *, folder: Path, say: Say) -> Outcomes:
        with shared_folder.asking(folder) as nonce:
            yield from _Distribution(self, function, _Queue(numbers), nonce, say).outcomes()


class _Queue:
    """Pending shard numbers, and the tries of each."""

    def __init__(self, numbers: Iterable[int]):
        self.waiting = deque(numbers)
        self.tries: Counter[int] = Counter()

    def settle(self, number: int, outcome: Any) -> Iterator[Outcome]:
        """Yield a final outcome; a number to be tried again goes to the end of the queue."""
        self.tries[number] += 1
        if isinstance(outcome, Failure) and outcome.verdict == "retry" and self.tries[number] < TRIES:
            self.waiting.append(number)
        else:
            yield number, outcome


class _Distribution:
    """One map over the workers of a scheduler, which may join and leave. Each task is pinned to one worker."""

    def __init__(self, cluster: Dask, function: Callable[[int], Any], queue: _Queue, nonce: Path, say: Say):
        self.cluster, self.client, self.say = cluster, cluster.client, say
        self.function, self.queue, self.nonce = function, queue, nonce
        self.threads: dict[str, int] = {}  # address -> threads, of every connected worker
        self.proofs: dict[Any, str] = {}  # future -> address
        self.shards: dict[Any, Outcome] = {}  # future -> (number, address)
        self.proved: set[str] = set()
        self.refused: dict[str, str] = {}  # address -> the reason, in a sentence
        self.looked = float("-inf")
        self.served = time.monotonic()
        self.is_waiting_said = False

    def outcomes(self) -> Outcomes:
        while self.queue.waiting or self.shards:
            yield from self._look()
            self._hand_out()
            self._check_service()
            yield from self._collect()
        self._forget()

    def _forget(self) -> None:
        """Let all workers clear their caches; one that does not answer soon does so before the next map."""
        from dask.distributed import CancelledError, wait

        told = [self._submit(address, give_back) for address in self.proved & self.threads.keys()]
        with suppress(TimeoutError, CancelledError), self.client.as_current():
            wait(told, timeout=FORGET_SECONDS)

    def _look(self) -> Iterator[Outcome]:
        """Update the workers; the shards of lost ones are tried again."""
        if time.monotonic() - self.looked < POLL_SECONDS:
            return
        self.threads, self.looked = self._living(), time.monotonic()
        for address in self.threads.keys() - self.proved - self.refused.keys() - set(self.proofs.values()):
            self.proofs[self._submit(address, _introduce, self.nonce, shared_folder.SEEN_SECONDS)] = address
        self.proved &= self.threads.keys()
        self.refused = {address: text for address, text in self.refused.items() if address in self.threads}
        for future, address in list(self.proofs.items()):
            if address not in self.threads:
                del self.proofs[future]
                self._name(_host(address), f"worker {address} left before it answered: is smalti installed there?")
        for future, (number, address) in list(self.shards.items()):
            if address not in self.threads:
                del self.shards[future]
                yield from self.queue.settle(number, _death(number))

    def _living(self) -> dict[str, int]:
        try:
            return dict(self.client.nthreads())
        except (OSError, RuntimeError) as error:  # dask's errors of a lost connection
            raise _lost() from error

    def _submit(self, address: str, function: Callable[..., Any], *args: Any) -> Any:
        return self.client.submit(function, *args, workers=[address], allow_other_workers=False, pure=False)

    def _hand_out(self) -> None:
        """Submit one shard for each free thread of the admitted workers."""
        busy = Counter(address for _, address in self.shards.values())
        for address in sorted(self.proved, key=lambda address: busy[address]):
            for _ in range(self.threads[address] - busy[address]):
                if not self.queue.waiting:
                    return
                number = self.queue.waiting.popleft()
                beside = sum(threads for other, threads in self.threads.items() if _host(other) == _host(address))
                shard = partial(work_beside, beside, self.function)
                self.shards[self._submit(address, attempt, shard, number)] = number, address

    def _check_service(self) -> None:
        """Report waiting; WorkerError after too long without a worker."""
        if self.proved:
            self.served, self.is_waiting_said = time.monotonic(), False
            return
        silent = time.monotonic() - self.served
        if silent >= SILENT_SECONDS and not self.is_waiting_said:
            self.say(self._waited_for())
            self.is_waiting_said = True
        if silent >= DESERTED_SECONDS and not self.proofs:
            raise WorkerError(
                f"the dask scheduler at {self.client.scheduler.address} has had no worker that can be used for {silent:.0f} s",
                hint="start workers with `dask worker` and run the same command again: finished shards are kept",
            )

    def _waited_for(self) -> str:
        address = self.client.scheduler.address
        if self.proofs:
            return f"waits for an answer of the dask workers at {address} ({len(self.proofs)} asked): they may be busy"
        limit = f"at most {DESERTED_SECONDS:.0f} s"
        return f"waits for a worker of the dask scheduler at {address} ({limit}): `dask worker` starts one"

    def _collect(self) -> Iterator[Outcome]:
        """Wait for finished tasks and process them."""
        for future in self._finished([*self.proofs, *self.shards]):
            if future in self.proofs:
                self._admit(self.proofs.pop(future), future)
            else:
                number, _ = self.shards.pop(future)
                yield from self.queue.settle(number, _outcome(future, number))

    def _finished(self, futures: list[Any]) -> list[Any]:
        from dask.distributed import CancelledError, wait

        if not futures:
            time.sleep(POLL_SECONDS)
            return []
        try:
            with self.client.as_current():  # `wait` asks the default client, which may be another one
                return list(wait(futures, timeout=POLL_SECONDS, return_when="FIRST_COMPLETED").done)
        except TimeoutError:
            return []
        except CancelledError as error:
            raise _lost() from error

    def _admit(self, address: str, future: Any) -> None:
        """Use the worker if it reads and writes the folder; report one that does not, once."""
        reason = self._doubt(address, future)
        if not reason:
            self.proved.add(address)
            return
        self.refused[address] = reason
        is_hope = (
            self.proved or self.proofs or self.shards or self.queue.tries or self.threads.keys() - self.refused.keys()
        )
        if not is_hope:
            raise StorageError(
                f"no dask worker can be used ({len(self.refused)} asked): {reason}",
                path=self.nonce.parent,
                hint="start workers that reach this folder under this path, or choose another --store",
            )
        self._name(address, reason)

    def _name(self, who: str, reason: str) -> None:
        """Report once why a worker is not used; a nanny may restart the same one at other ports."""
        if who not in self.cluster.named:
            self.cluster.named.add(who)
            self.say(f"not used: {reason}")

    def _doubt(self, address: str, future: Any) -> str:
        try:
            given = future.result(timeout=RESULT_SECONDS)
        except Exception as error:  # without smalti, or lost
            return f"worker {address} cannot run tasks of smalti: {_root(error)}"
        reason = shared_folder.find_fault(self.nonce, given)
        return reason and f"worker {address} ({given.who}) cannot use {self.nonce.parent}: {reason}"


@contextmanager
def connect(*, workers: int = 0, scheduler: str | None = None, say: Say = lambda text: None) -> Iterator[Cluster]:
    """Yield the cluster of the command line's options.

    workers: local dask processes (0: in this process).  scheduler: address of a dask scheduler, such as tcp://host:8786.
    say: prints a line if the scheduler does not answer at once.
    """
    if workers and scheduler:
        raise UsageError("--workers starts a local cluster and --scheduler uses another: give one of them")
    if workers < 0:
        raise UsageError(f"--workers must be 0 or more, found {workers}")
    if not workers and not scheduler:
        yield InProcess()
        return
    from dask.distributed import Client, LocalCluster

    silence_dask()
    if scheduler:
        with _reach(scheduler, say) as client:
            yield Dask(client)
        return
    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address="127.0.0.1:0") as local,
        Client(local) as client,
    ):
        client.register_plugin(_places(workers))
        yield Dask(client)


def _places(workers: int) -> Any:
    """A dask plugin that tells each local worker its number, also after a restart, so that each uses its own device."""
    from dask.distributed import WorkerPlugin

    class Places(WorkerPlugin):
        name = "places"

        def setup(self, worker: Any) -> None:
            ranks.take_place(int(worker.name), workers)

    return Places()


def _reach(scheduler: str, say: Say) -> Any:
    from dask.distributed import Client

    try:
        with suppress(OSError):
            return Client(scheduler, timeout=SILENT_SECONDS)
        say(f"waits for an answer of the dask scheduler at {scheduler} (at most {CONNECT_SECONDS:.0f} s)")
        return Client(scheduler, timeout=CONNECT_SECONDS - SILENT_SECONDS)
    except (OSError, ValueError) as error:
        message = f"no dask scheduler answers at {scheduler}"
        raise StorageError(message, hint="start one with `dask scheduler`") from error


def _introduce(nonce: Path, seconds: float) -> shared_folder.Answer:
    """In a worker: clear caches of an earlier map, and answer for the check of the folder."""
    give_back()
    return shared_folder.answer(nonce, seconds)


def attempt(function: Callable[[int], Any], number: int) -> Any:
    """The result of `function(number)`, or a Failure for its exception."""
    try:
        return function(number)
    except (CannotWrite, MemoryExhausted) as error:
        return Failure(error, "stop")
    except SmaltiError as error:
        return Failure(error, "retry" if isinstance(error, StorageError) else "name")
    except MemoryError as error:
        return _raised(MemoryExhausted, error, "stop")
    except OSError as error:
        return _raised(StorageError, error, "retry")
    except Exception as error:
        return _raised(WorkerError, error, "stop")


def _raised(kind: type[SmaltiError], error: Exception, verdict: Literal["retry", "stop"]) -> Failure:
    """A Failure with the text of an exception, since not every exception can be pickled."""
    place = extract_tb(error.__traceback__)[-1]
    text = f"{_first_line(error)} ({place.filename}:{place.lineno})"
    return Failure(kind(text), verdict, "".join(format_exception(error)))


def _host(address: str) -> str:
    return address.rpartition(":")[0]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _root(error: BaseException) -> str:
    """The root cause of dask's error for a task that could not be sent, such as a module that is not installed there."""
    return _first_line(error) if error.__cause__ is None else _root(error.__cause__)


def _outcome(future: Any, number: int) -> Any:
    from dask.distributed import CancelledError, KilledWorker

    try:
        return future.result(timeout=RESULT_SECONDS)
    except (TimeoutError, KilledWorker):  # the worker died with its result
        return _death(number)
    except CancelledError as error:
        raise _lost() from error
    except Exception as error:
        sentence = f"the shard or its result cannot be sent between client, scheduler and worker: {_root(error)}"
        return Failure(WorkerError(sentence), "stop", "".join(format_exception(error)))


def _death(number: int) -> Failure:
    return Failure(WorkerError(f"the worker of shard {number} died in each of {TRIES} tries"), "retry")


def silence_dask() -> None:
    """Turn off dask's log: errors are reported by this module."""
    import dask.distributed  # noqa: F401 - makes the loggers

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _lost() -> StorageError:
    return StorageError(
        "the connection to the dask scheduler is lost",
        hint="start it again and run the same command: finished shards are kept",
    )
