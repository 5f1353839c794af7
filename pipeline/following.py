"""Every process of a launch but process 0: it waits for orders, carries them out, and leaves when it is told to.

It plans nothing, takes no lock and writes nothing into the store. What it trains comes with the order; what the stage
writes in this process goes into a folder that is removed.
"""

from __future__ import annotations

import os
import platform
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from pydantic import BaseModel

from pipeline import followers, link, proof, ranks
from pipeline.artifact import Artifact, check_data
from pipeline.cluster import InProcess
from pipeline.config import parse_config
from pipeline.draft import Draft, Request
from pipeline.errors import CorruptError, SmaltiError, StorageError
from pipeline.externals import needs
from pipeline.followers import CAUSE_SECONDS, LEAVE_SECONDS, Say
from pipeline.kept import give_back
from pipeline.launched import working_for
from pipeline.link import Link, Message
from pipeline.outside import open_input
from pipeline.progress import Progress
from pipeline.runner import make_request
from pipeline.runtime import Runtime, Terminated
from pipeline.stage import Inputs, Stage

KNOCK_SECONDS = 0.5
ANSWER_SECONDS = 1.0
AGAIN = "run the same command again: it continues from what is saved"

Explain = Callable[[Exception], SmaltiError]


class Dismissed(Exception):
    """Process 0 has told this one to leave."""


class Failed(Exception):
    """The training failed in this process, and process 0 knows why."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


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
        return failed.code
    except (KeyboardInterrupt, Terminated) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else 143
        leader.answer({"is": "failed", "error": _as_json(SmaltiError("was stopped by a signal"), code)})
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
            work.enter_context(working_for(f"tcp://{leader.address}:{order['port']}"))
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

    def train(self, function: Callable[[], None], explain: Explain) -> None:
        """Run one training and say how it ended. Failed, Dismissed, StorageError: there is nothing to be done any more."""
        self._trains = True
        try:
            function()
        except Exception as error:
            self._fail(error, explain)
        finally:
            self._trains = False
        self.answer({"is": "done"})

    def close(self) -> None:
        self._link.close()

    def _fail(self, error: Exception, explain: Explain) -> None:
        """Tell process 0 what went wrong, unless that came from the end of process 0."""
        if not isinstance(error, SmaltiError):  # an exchange may have broken because process 0 ends: wait for its word
            self._has_ended.wait(CAUSE_SECONDS)
        if not self._has_ended.is_set():
            explained = explain(error)
            self.answer({"is": "failed", "error": _as_json(explained, explained.exit_code)})
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
            end = StorageError(
                f"process 0 at {self.address} has been silent for {link.SILENCE_SECONDS:.0f} s", hint=AGAIN
            )
        except OSError:
            pass
        self._end = end
        self._has_ended.set()
        self._orders.put(None)
        time.sleep(LEAVE_SECONDS)
        self._leave()

    def _leave(self) -> None:
        """End a training that hangs in an exchange with a process that is gone."""
        if not self._trains:
            return
        if isinstance(self._end, SmaltiError):
            self._say(self._end)
            os._exit(self._end.exit_code)
        os._exit(0)


def _reach() -> Link:
    """The connection to process 0, which may start later than this process."""
    meeting, host = ranks.meeting(), platform.node()
    deadline = time.monotonic() + followers.ARRIVAL_SECONDS
    while time.monotonic() < deadline:
        for port in meeting.ports:
            with suppress(OSError):
                connection = socket.create_connection((meeting.host, port), timeout=link.GREETING_SECONDS)
                if link.greet_first(connection, meeting.key, rank=ranks.rank(), host=host):
                    return Link(connection)
                connection.close()
        time.sleep(KNOCK_SECONDS)
    raise StorageError(
        f"process {ranks.rank()} ({host}) did not reach process 0 at {meeting.host}, ports {meeting.ports[0]} to "
        f"{meeting.ports[-1]}, within {followers.ARRIVAL_SECONDS:.0f} s",
        hint="look whether it runs, and whether the machines reach each other on every port",
    )


@dataclass(frozen=True, eq=False)
class _Task:
    """What a stage is called with in this process, but for the draft."""

    declared: Stage
    config: BaseModel
    inputs: Inputs
    request: Request
    run: Runtime

    def work(self, folder: Path) -> None:
        draft = Draft.open(folder, self.request)
        try:
            self.declared.function(self.config, self.inputs, draft, replace(self.run, log=draft.log))
        finally:
            give_back()


def _take_part(leader: Leader, order: Message, stages: Mapping[str, Stage], explain: Explain) -> None:
    """One training: check that everything is here, say so, and train when all have said so."""
    try:
        task = _prepare(order, stages)
    except Exception as error:
        refused = explain(error)
        leader.answer({"is": "refused", "error": _as_json(refused, refused.exit_code)})
        return
    leader.answer({"is": "ready"})
    leader.next_order()
    with TemporaryDirectory() as folder:
        leader.train(lambda: task.work(Path(folder)), explain)


def _prepare(order: Message, stages: Mapping[str, Stage]) -> _Task:
    """StorageError, CorruptError: this process does not find what process 0 has."""
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
    run = Runtime(
        cluster=InProcess(),
        progress=Progress(),
        log=Path(order["draft"]),
        device=order["device"],
        threads=order["threads"],
        checkpoint_seconds=order["checkpoint_seconds"],
        paths={**paths, **files},
        store=Path(order["store"]),
    )
    return _Task(declared, config, inputs, request, run)


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


def _as_json(error: SmaltiError, code: int) -> dict[str, Any]:
    return {"code": code, "message": error.message, "path": error.path, "hint": error.hint}
