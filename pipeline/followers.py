"""The other processes of a launch, as process 0 sees them: `torchrun` and `accelerate launch` start several.

Process 0 alone runs the runner. It listens from its first moment on; the others come to it and wait for orders:
to take part in a training, to work on the dask cluster of process 0, or to leave (`pipeline.following`). An order to train
names every input by path and digest, and the training begins when all have found the same ones. An error of one process
ends all of them, and process 0 says it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import proof, ranks
from pipeline.errors import SmaltiError, StorageError
from pipeline.link import Link, Message, greet_follower

ARRIVAL_SECONDS = 120.0
"""How long the processes of a launch wait for each other at the start."""
CAUSE_SECONDS = 2.0
"""How long a process whose exchange broke waits for word of the cause."""
LEAVE_SECONDS = 20.0
"""After so long a process that hangs in an exchange with a lost one is ended."""

STOPPED = 128  # exit codes from here on are signals

Say = Callable[[SmaltiError], None]


@dataclass
class Follower:
    """One of the others: its latest answer, and whether it has left."""

    name: str
    link: Link
    answer: Message = field(default_factory=dict)
    has_left: bool = False


class Followers:
    """All others of this launch; without a launcher there are none, and everything here is done at once.

    say: prints an error where this process cannot raise it any more.
    """

    def __init__(self, count: int = 0, say: Say = lambda error: None):
        self.count = count
        self._say = say
        self._changed = threading.Condition()
        self._present: dict[int, Follower] = {}
        self._failure: SmaltiError | None = None
        self._work: Message | None = None
        self._trains = self._dismissed = False

    @classmethod
    def listen(cls, say: Say) -> Followers:
        """Those that the launcher has started beside this process, from now on heard."""
        followers = cls(ranks.world_size() - 1, say)
        if followers.count:
            meeting = ranks.meeting()
            server = _serve(meeting)
            threading.Thread(target=followers._receive, args=(server, meeting.key), daemon=True).start()
        return followers

    @contextmanager
    def training(self, order: Message) -> Iterator[None]:
        """Within this block all processes train what `order` says; it ends when all are done.

        It begins when each has found the same inputs, or raises what one of them has found instead.
        """
        if not self.count:
            yield
            return
        self._gather()
        with proof.asking(Path(order["draft"])) as nonce:
            self._tell({**order, "do": "prepare", "nonce": str(nonce), "written": nonce.read_text()})
            self._collect("ready")
        self._tell({"do": "train"})
        self._trains = True
        try:
            yield
            self._collect("done")
        except BaseException as error:
            cause = self._cause(error)
            if cause is error:
                raise
            raise cause from error
        finally:
            self._trains = False

    def work_for(self, port: int) -> None:
        """Let all, and whoever comes later, work for the dask scheduler that listens on this port of this machine."""
        with self._changed:
            self._work = {"do": "work", "port": port}
        self._tell(self._work)

    def dismiss(self, *, patience: float) -> None:
        """Tell all to leave. patience: seconds to wait for those that have not come yet."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._present) == self.count or self._failure, patience)
            self._dismissed = True
        self._tell({"do": "leave"})
        with self._changed:
            self._changed.wait_for(lambda: all(follower.has_left for follower in self._present.values()), 1.0)

    def _gather(self) -> None:
        """Wait until all have come. StorageError: somebody has not, or has left."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._present) == self.count or self._failure, ARRIVAL_SECONDS)
            missing = sorted({*range(1, self.count + 1)} - {*self._present})
        if self._failure is not None:
            raise self._failure
        if missing:
            numbers = ", ".join(map(str, missing))
            raise StorageError(
                f"of {self.count + 1} processes number {numbers} did not reach process 0 within {ARRIVAL_SECONDS:.0f} s",
                hint="look whether they run, and whether the machines reach each other on every port",
            )

    def _tell(self, message: Message) -> None:
        with self._changed:
            followers = [follower for follower in self._present.values() if not follower.has_left]
            for follower in followers:
                follower.answer = {}
        for follower in followers:
            with suppress(OSError):  # whoever listens to it will notice
                follower.link.send(message)

    def _collect(self, word: str) -> None:
        """Wait until all have answered `word`; raises the first failure instead."""

        def is_over() -> bool:
            return self._failure is not None or all(one.answer.get("is") == word for one in self._present.values())

        with self._changed:
            self._changed.wait_for(is_over)
        if self._failure is not None:
            raise self._failure

    def _cause(self, error: BaseException) -> BaseException:
        """What ended the training: this error, or the failure of another process, by which it came about."""
        is_signal = not isinstance(error, Exception)
        if isinstance(error, SmaltiError):
            return error
        with self._changed:
            if not is_signal:
                self._changed.wait_for(lambda: self._failure, CAUSE_SECONDS)
            failure = self._failure
        if failure is None or (is_signal and failure.exit_code >= STOPPED):
            return error
        return failure

    def _receive(self, server: socket.socket, key: bytes) -> None:
        """Take everybody in, until the process ends: a thread each."""
        while True:
            connection, _ = server.accept()
            threading.Thread(target=self._welcome, args=(connection, key), daemon=True).start()

    def _welcome(self, connection: socket.socket, key: bytes) -> None:
        """Greet one process, and hear what it says for as long as it is there."""
        try:
            about = greet_follower(connection, key)
        except OSError:
            about = None
        if about is None:
            connection.close()
            return
        follower = Follower(f"process {about['rank']} ({about['host']})", Link(connection))
        with self._changed:
            self._present[int(about["rank"])] = follower
            late = {"do": "leave"} if self._dismissed else self._work
            self._changed.notify_all()
        ended = "is gone: it was killed, or its connection broke"
        try:
            if late is not None:
                follower.link.send(late)
            for message in follower.link.messages():
                self._note(follower, message)
        except TimeoutError:
            ended = "is silent: its machine or the network has failed"
        except OSError:
            pass
        self._note_end(follower, ended)

    def _note(self, follower: Follower, message: Message) -> None:
        if message["is"] in ("refused", "failed"):
            self._fail(_error_of(follower, message["error"]))
        else:
            with self._changed:
                follower.answer = message
                self._changed.notify_all()

    def _note_end(self, follower: Follower, ended: str) -> None:
        follower.link.close()
        if not self._dismissed:  # the first failure counts, so whoever has told one may go
            hint = "run the same command again: it continues from what is saved"
            self._fail(StorageError(f"{follower.name} {ended}", hint=hint))
        with self._changed:
            follower.has_left = True
            self._changed.notify_all()

    def _fail(self, failure: SmaltiError) -> None:
        """Note the first failure, for the main thread to raise. A stop is not one to hurry for: this process may be saving."""
        with self._changed:
            if self._failure is None:
                self._failure = failure
                if failure.exit_code < STOPPED:
                    threading.Thread(target=self._end, args=(failure,), daemon=True).start()
            self._changed.notify_all()

    def _end(self, failure: SmaltiError) -> None:
        """End a training that hangs in an exchange with a process that is gone."""
        time.sleep(LEAVE_SECONDS)
        if self._trains:
            self._say(failure)
            os._exit(failure.exit_code)


def _serve(meeting: ranks.Meeting) -> socket.socket:
    """Listen on the first free port; on all addresses where a process may come from another machine."""
    is_dual = not meeting.is_one_host and socket.has_dualstack_ipv6()
    for port in meeting.ports:
        with suppress(OSError):
            if is_dual:
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            return socket.create_server((meeting.host if meeting.is_one_host else "", port))
    raise StorageError(
        f"none of the ports {meeting.ports[0]} to {meeting.ports[-1]} is free, and process 0 needs one for the others",
        hint="choose another port with torchrun --master-port",
    )


def _error_of(follower: Follower, told: dict[str, Any]) -> SmaltiError:
    error = SmaltiError(f"{follower.name}: {told['message']}", path=told["path"], hint=told["hint"])
    error.exit_code = int(told["code"])
    return error
