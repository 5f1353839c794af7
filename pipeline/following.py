"""Every process of a launch but process 0: it waits for orders, carries them out, and leaves when it is told to.

It plans nothing, takes no lock and writes nothing into the store. What it trains comes with the order; what the stage
writes in this process goes into a folder that is removed.
"""

from __future__ import annotations

import asyncio
import os
import platform
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from pipeline import launch, proof, ranks
from pipeline.artifact import Artifact, check_data
from pipeline.cluster import InProcess, silence_dask
from pipeline.config import parse_config
from pipeline.draft import Draft, Request
from pipeline.errors import CorruptError, SmaltiError, StorageError
from pipeline.externals import needs
from pipeline.launch import AGAIN, CAUSE_SECONDS, GREETING_SECONDS, LEAVE_SECONDS, Link, Message, Say
from pipeline.outside import open_input
from pipeline.progress import Progress
from pipeline.runner import make_request
from pipeline.runtime import Runtime, Terminated
from pipeline.stage import Inputs, Stage
from pipeline.stage_cache import give_back

KNOCK_SECONDS = 0.5
ANSWER_SECONDS = 1.0
WORK_END_SECONDS = 2.0

Explain = Callable[[Exception], SmaltiError]
Train = Callable[[Path], None]
"""A training of this process, given the folder of its draft."""


class Dismissed(Exception):
    """Process 0 has told this one to leave."""


class Failed(Exception):
    """The training failed in this process, and process 0 knows why. args: the exit code."""


def follow(stages: Mapping[str, Stage], *, explain: Explain, say: Say) -> int:
    """Do what process 0 says until it says leave; the exit code of this process, where process 0 knows the reason.

    explain: any exception as an error for a user.  say: prints an error where this process cannot raise it any more.
    StorageError: process 0 cannot be reached, is gone, or was silent too long.
    """
    leader = Leader(_reach(), say)
    try:
        with ExitStack() as work:
            _obey(leader, stages, explain, work)
    except Dismissed:
        return 0
    except Failed as failed:
        return int(failed.args[0])
    except (KeyboardInterrupt, Terminated) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else 143
        leader.fail(SmaltiError("was stopped by a signal"), code)
        return code
    finally:
        leader.close()


def _obey(leader: Leader, stages: Mapping[str, Stage], explain: Explain, work: ExitStack) -> NoReturn:
    """Carry out order after order, until there is none any more. work: holds the worker for shards."""
    works = False
    while True:
        order = leader.next_order()
        if order["do"] != "work":
            _take_part(leader, order, stages, explain)
        elif not works:  # it may be said twice to a process that comes at that moment
            work.enter_context(_working_for(f"tcp://{leader.address}:{order['port']}"))
            works = True


class Leader:
    """Process 0, as another process sees it."""

    def __init__(self, connection: Link, say: Say):
        self.address = connection.address
        self._link = connection
        self._say = say
        self._orders: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._has_ended = threading.Event()
        self._end: Exception = Dismissed()
        self._trains = False
        threading.Thread(target=self._listen, name="orders", daemon=True).start()

    def next_order(self) -> Message:
        """Wait for it. Dismissed: there is none any more; StorageError: process 0 is gone."""
        order = self._orders.get()
        if order is None:
            raise self._end
        return order

    def answer(self, message: Message) -> None:
        with suppress(OSError):  # the listening thread notices
            self._link.send(message)

    def fail(self, error: SmaltiError, code: int) -> None:
        told = {"code": code, "message": error.message, "path": error.path, "hint": error.hint}
        self.answer({"is": "failed", "error": told})

    def train(self, function: Train, explain: Explain) -> None:
        """Run one training and say how it ended. Failed, Dismissed, StorageError: there is nothing to be done any more."""
        self._trains = True
        try:
            with TemporaryDirectory() as folder:
                function(Path(folder))
        except Exception as error:
            self._end_with(error, explain)
        finally:
            self._trains = False
        self.answer({"is": "done"})

    def close(self) -> None:
        self._link.close()

    def _end_with(self, error: Exception, explain: Explain) -> NoReturn:
        """Tell process 0 what went wrong, unless that came from the end of process 0."""
        if not isinstance(error, SmaltiError):  # an exchange may have broken because process 0 ends: wait for its word
            self._has_ended.wait(CAUSE_SECONDS)
        if not self._has_ended.is_set():
            explained = explain(error)
            self.fail(explained, explained.exit_code)
            if not self._has_ended.wait(ANSWER_SECONDS):
                raise Failed(explained.exit_code) from error
        raise self._end from error

    def _listen(self) -> None:
        end: Exception = StorageError(
            f"process 0 at {self.address} is gone: it was killed, or the connection broke", hint=AGAIN
        )
        try:
            for message in self._link.messages():
                if message["do"] == "leave":
                    end = Dismissed()
                    break
                self._orders.put(message)
        except TimeoutError:
            silence = f"has been silent for {launch.SILENCE_SECONDS:.0f} s"
            end = StorageError(f"process 0 at {self.address} {silence}", hint=AGAIN)
        except OSError:
            pass
        self._end = end
        self._has_ended.set()
        self._orders.put(None)
        time.sleep(LEAVE_SECONDS)
        if self._trains:  # it hangs in an exchange with a process that is gone
            if isinstance(end, SmaltiError):
                self._say(end)
            os._exit(end.exit_code if isinstance(end, SmaltiError) else 0)


def _reach() -> Link:
    """The connection to process 0, which may start later than this process."""
    meeting, host = ranks.meeting(), platform.node()
    deadline = time.monotonic() + launch.ARRIVAL_SECONDS
    while time.monotonic() < deadline:
        for port in meeting.ports:
            with suppress(OSError):
                found = socket.create_connection((meeting.host, port), timeout=GREETING_SECONDS)
                link = Link(found, meeting.key, is_first=False)
                link.send({"rank": ranks.rank(), "host": host})
                return link
        time.sleep(KNOCK_SECONDS)
    raise StorageError(
        f"process {ranks.rank()} ({host}) did not reach process 0 at {meeting.host}, ports {meeting.ports[0]} to "
        f"{meeting.ports[-1]}, within {launch.ARRIVAL_SECONDS:.0f} s",
        hint="look whether it runs, and whether the machines reach each other on every port",
    )


@contextmanager
def _working_for(scheduler: str) -> Iterator[None]:
    """Within this block a thread of this process works for a dask scheduler; it ends with the scheduler."""
    silence_dask()
    with TemporaryDirectory() as folder:
        thread = threading.Thread(target=lambda: asyncio.run(_work(scheduler, folder)), name="shards", daemon=True)
        thread.start()
        try:
            yield
        finally:
            thread.join(WORK_END_SECONDS)


async def _work(scheduler: str, folder: str) -> None:
    from dask.distributed import Worker

    worker: Any = Worker(scheduler, nthreads=1, memory_limit=0, local_directory=folder, dashboard=False)
    async with worker:
        await worker.finished()


def _take_part(leader: Leader, order: Message, stages: Mapping[str, Stage], explain: Explain) -> None:
    """One training: check that everything is here, say so, and train when all have said so."""
    try:
        train = _prepare(order, stages)
    except Exception as error:
        refused = explain(error)
        leader.fail(refused, refused.exit_code)
        return
    leader.answer({"is": "ready"})
    leader.next_order()
    leader.train(train, explain)


def _prepare(order: Message, stages: Mapping[str, Stage]) -> Train:
    """The training that an order asks for. StorageError, CorruptError: this process does not find what process 0 has."""
    check_store(order)
    declared, wanted = stages[order["stage"]], Request(**order["request"])
    config = parse_config(declared.config, wanted.config, where=declared.name)
    inputs = Inputs({name: _opened(value) for name, value in order["inputs"].items()})
    paths = {name: Path(path) for name, path in order["paths"].items()}
    request = make_request(declared, config, inputs, paths)
    for name, paths_of in order["inputs"].items():
        if request.inputs[name] != wanted.inputs[name]:
            found = " and ".join(paths_of if isinstance(paths_of, list) else [paths_of])
            raise CorruptError(
                f"the input {name} at {found} is not the one that process 0 reads",
                hint="give all processes the same store",
            )
    if request != wanted:
        odd = ", ".join(name for name, value in asdict(request).items() if value != asdict(wanted)[name])
        raise CorruptError(
            f"{declared.name} is not the same here as in process 0: {odd} differ",
            hint="install the same version of everything and give the same external data on all machines",
        )
    if ranks.local_rank() == 0:  # once on each machine; process 0 has done it on its own
        for artifact in inputs.flat():
            check_data(artifact)
    files = {need.external: need.get(Progress()) for need in needs(declared, config, paths)}
    run = partial(
        Runtime,
        InProcess(),
        Progress(),
        device=order["device"],
        threads=order["threads"],
        checkpoint_seconds=order["checkpoint_seconds"],
        paths={**paths, **files},
    )

    def train(folder: Path) -> None:
        draft = Draft.open(folder, request)
        try:
            declared.function(config, inputs, draft, run(log=draft.log))
        finally:
            give_back()

    return train


def check_store(order: Message) -> None:
    """StorageError unless this process reads what process 0 has just written into the draft."""
    nonce = Path(order["nonce"])
    if not proof.becomes_true(lambda: nonce.is_file() and nonce.read_text() == order["written"], proof.SEEN_SECONDS):
        raise StorageError(
            f"cannot see the store at {order['store']}",
            path=order["store"],
            hint="put the store on a file system that all machines mount at the same place",
        )


def _opened(paths: str | list[str]) -> Artifact | list[Artifact]:
    return [open_input(Path(path)) for path in paths] if isinstance(paths, list) else open_input(Path(paths))
