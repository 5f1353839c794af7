"""The processes of a launch other than process 0: they wait for orders of process 0, execute them, and exit on order.

They plan nothing, take no lock and write nothing into the store. An order names the training; what the stage writes in
these processes goes into a temporary folder.
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

from pipeline import launch, ranks, shared_folder
from pipeline.artifact import Artifact, check_data
from pipeline.cluster import InProcess, silence_dask
from pipeline.config import parse_config
from pipeline.draft import Draft, Request
from pipeline.errors import CorruptError, SmaltiError, StorageError
from pipeline.externals import needs
from pipeline.launch import AGAIN, CAUSE_SECONDS, GREETING_SECONDS, LEAVE_SECONDS, Link, Message, Say
from pipeline.outside_tokens import open_input
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
    """Process 0 has ordered this process to exit."""


class Failed(Exception):
    """The training failed in this process, which was reported to process 0. args: the exit code."""


def follow(stages: Mapping[str, Stage], *, explain: Explain, say: Say) -> int:
    """Execute the orders of process 0 until it orders to exit; returns the exit code.

    explain: turns any exception into an error for users.  say: prints an error where this process cannot raise it.
    StorageError: process 0 cannot be reached, was lost, or was silent too long.
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
    """Execute orders until an exception ends it. work: holds the worker for shards."""
    works = False
    while True:
        order = leader.next_order()
        if order["do"] != "work":
            _take_part(leader, order, stages, explain)
        elif not works:  # a process that joins at that moment may get the order twice
            work.enter_context(_working_for(f"tcp://{leader.address}:{order['port']}"))
            works = True


class Leader:
    """Process 0, as seen by another process."""

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
        """Wait for the next order. Dismissed: process 0 ordered to exit; StorageError: process 0 was lost."""
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
        """Run one training and report its end. Failed, Dismissed, StorageError: this process has to exit."""
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
        """Report the error to process 0, unless the end of process 0 has caused it."""
        if not isinstance(
            error, SmaltiError
        ):  # a collective may have failed because process 0 ends: wait for its message
            self._has_ended.wait(CAUSE_SECONDS)
        if not self._has_ended.is_set():
            explained = explain(error)
            self.fail(explained, explained.exit_code)
            if not self._has_ended.wait(ANSWER_SECONDS):
                raise Failed(explained.exit_code) from error
        raise self._end from error

    def _listen(self) -> None:
        end: Exception = StorageError(
            f"process 0 at {self.address} was lost: it was killed, or the connection broke", hint=AGAIN
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
        if self._trains:  # it hangs in a collective with a lost process
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
        hint="check that it runs, and that the machines reach each other on every port",
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
    """One training: check that all inputs are here, report it, and train when process 0 orders it."""
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
    """The training of an order. StorageError, CorruptError: this process finds other data than process 0."""
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
    if ranks.local_rank() == 0:  # once on each machine; process 0 has done it on its machine
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
    """StorageError unless this process reads the nonce that process 0 wrote into the draft."""
    nonce = Path(order["nonce"])
    if not shared_folder.becomes_true(
        lambda: nonce.is_file() and nonce.read_text() == order["written"], shared_folder.SEEN_SECONDS
    ):
        raise StorageError(
            f"cannot see the store at {order['store']}",
            path=order["store"],
            hint="put the store on a file system that all machines mount at the same path",
        )


def _opened(paths: str | list[str]) -> Artifact | list[Artifact]:
    return [open_input(Path(path)) for path in paths] if isinstance(paths, list) else open_input(Path(paths))
