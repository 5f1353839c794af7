"""The other processes of a launch (`torchrun`, `accelerate launch`) as seen by process 0, and the connections.

Only process 0 runs the runner. It listens from its start; the others connect and wait for orders (`pipeline.following`):
to take part in a training, to work on the dask cluster of process 0, or to exit. An order to train names every input by
path and digest, and the training begins when all processes have found the same inputs. An error of one process ends all
of them, and process 0 reports it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from pipeline import ranks, shared_folder
from pipeline.cluster import Dask, Outcome, silence_dask
from pipeline.errors import SmaltiError, StorageError

ARRIVAL_SECONDS = 120.0
"""How long the processes of a launch wait for each other at the start."""
CAUSE_SECONDS = 2.0
"""How long a process whose collective failed waits for a report of the cause."""
LEAVE_SECONDS = 20.0
"""How long a process may hang in a collective with a lost process before it is ended."""
BEAT_SECONDS = 5.0
SILENCE_SECONDS = 60.0
"""Time without messages after which the other side is considered lost."""
GREETING_SECONDS = 5.0
STOPPED = 128  # exit codes from here on are signals
AGAIN = "run the same command again: it continues from the last checkpoint"

Message = dict[str, Any]
Say = Callable[[SmaltiError], None]


class Link:
    """A connection that both sides have authenticated with the key: messages of JSON, and a heartbeat.

    OSError: authentication failed, or the connection broke.  TimeoutError: no answer.
    """

    def __init__(self, found: socket.socket, key: bytes, *, is_first: bool):
        self.address = str(found.getpeername()[0])
        found.settimeout(None)
        self._socket, self._connection = found, Connection(found.fileno())
        self._sending, self._closed = threading.Lock(), threading.Event()
        try:
            if not is_first and not self._connection.poll(GREETING_SECONDS):
                raise TimeoutError("no greeting")
            for prove in (deliver_challenge, answer_challenge) if is_first else (answer_challenge, deliver_challenge):
                prove(self._connection, key)
        except (OSError, EOFError, AuthenticationError, AssertionError) as error:
            self.close()
            raise OSError(f"{self.address} is not a process of this launch") from error
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def send(self, message: Message) -> None:
        with self._sending:
            self._connection.send_bytes(json.dumps(message).encode())

    def messages(self) -> Iterator[Message]:
        """Messages of the other side, until it closes."""
        with suppress(EOFError):
            while self._connection.poll(SILENCE_SECONDS):
                if message := json.loads(self._connection.recv_bytes()):
                    yield message
            raise TimeoutError("silence")

    def close(self) -> None:
        self._closed.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # also wakes a thread that waits for a message
        self._socket.detach()
        self._connection.close()

    def _beat(self) -> None:
        """Send an empty message every BEAT_SECONDS."""
        with suppress(OSError):
            while not self._closed.wait(BEAT_SECONDS):
                self.send({})


@dataclass
class Follower:
    """One of the other processes: its latest answer, and whether it has exited."""

    name: str
    link: Link
    answer: Message = field(default_factory=dict)
    has_left: bool = False


class Followers:
    """All other processes of this launch; none without a launcher.

    say: prints an error where this process cannot raise it.
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
        """Start to listen for the other processes of the launch."""
        followers = cls(ranks.world_size() - 1, say)
        if followers.count:
            meeting = ranks.meeting()
            server = _serve(meeting)
            threading.Thread(target=followers._receive, args=(server, meeting.key), daemon=True).start()
        return followers

    @contextmanager
    def training(self, order: Message) -> Iterator[None]:
        """Within this block all processes run the training of `order`; it ends when all are done.

        It begins when each has found the same inputs, or raises the error of one that has not.
        """
        if not self.count:
            yield
            return
        self._gather()
        with shared_folder.asking(Path(order["draft"])) as nonce:
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
        """Let all processes, also later ones, work for the dask scheduler on this port of this machine."""
        with self._changed:
            self._work = {"do": "work", "port": port}
        self._tell(self._work)

    def dismiss(self, *, patience: float) -> None:
        """Order all to exit. patience: seconds to wait for those that have not connected yet."""
        self._wait(lambda: len(self._present) == self.count, patience)
        self._dismissed = True
        self._tell({"do": "leave"})
        with self._changed:
            self._changed.wait_for(lambda: all(follower.has_left for follower in self._present.values()), 1.0)

    def _gather(self) -> None:
        """Wait until all have connected. StorageError: one has not, or has exited."""
        self._wait(lambda: len(self._present) == self.count, ARRIVAL_SECONDS)
        if self._failure is not None:
            raise self._failure
        missing = sorted({*range(1, self.count + 1)} - {*self._present})
        if missing:
            numbers = ", ".join(map(str, missing))
            raise StorageError(
                f"of {self.count + 1} processes number {numbers} did not reach process 0 within {ARRIVAL_SECONDS:.0f} s",
                hint="check that they run, and that the machines reach each other on every port",
            )

    def _wait(self, is_over: Callable[[], bool], seconds: float | None = None) -> None:
        """Wait for a condition, or for the first failure."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or is_over(), seconds)

    def _tell(self, message: Message) -> None:
        with self._changed:
            followers = [follower for follower in self._present.values() if not follower.has_left]
            for follower in followers:
                follower.answer = {}
        for follower in followers:
            with suppress(OSError):  # noticed by the thread that listens to it
                follower.link.send(message)

    def _collect(self, word: str) -> None:
        """Wait until all have answered `word`; raises the first failure instead."""
        self._wait(lambda: all(follower.answer.get("is") == word for follower in self._present.values()))
        if self._failure is not None:
            raise self._failure

    def _cause(self, error: BaseException) -> BaseException:
        """The error that ended the training: this one, or the failure of another process that caused it."""
        if isinstance(error, SmaltiError):
            return error
        is_signal = not isinstance(error, Exception)
        if not is_signal:
            self._wait(lambda: False, CAUSE_SECONDS)
        failure = self._failure
        return error if failure is None or (is_signal and failure.exit_code >= STOPPED) else failure

    def _receive(self, server: socket.socket, key: bytes) -> None:
        """Accept connections until the process ends, with a thread for each."""
        while True:
            found, _ = server.accept()
            threading.Thread(target=self._welcome, args=(found, key), daemon=True).start()

    def _welcome(self, found: socket.socket, key: bytes) -> None:
        """Authenticate one process and receive its messages until it exits."""
        try:
            link = Link(found, key, is_first=True)
            messages = link.messages()
            about = next(messages)
        except (OSError, StopIteration):
            return
        follower = Follower(f"process {about['rank']} ({about['host']})", link)
        with self._changed:
            self._present[int(about["rank"])] = follower
            late = {"do": "leave"} if self._dismissed else self._work
            self._changed.notify_all()
        ended = "was lost: it was killed, or its connection broke"
        try:
            if late is not None:
                link.send(late)
            for message in messages:
                self._note(follower, message)
        except TimeoutError:
            ended = "is silent: its machine or the network has failed"
        except OSError:
            pass
        link.close()
        if not self._dismissed:  # only the first failure counts: a process that reported one may exit
            self._fail(StorageError(f"{follower.name} {ended}", hint=AGAIN))
        with self._changed:
            follower.has_left = True
            self._changed.notify_all()

    def _note(self, follower: Follower, message: Message) -> None:
        told = message.get("error")
        if told is not None:
            error = SmaltiError(f"{follower.name}: {told['message']}", path=told["path"], hint=told["hint"])
            error.exit_code = int(told["code"])
            self._fail(error)
            return
        with self._changed:
            follower.answer = message
            self._changed.notify_all()

    def _fail(self, failure: SmaltiError) -> None:
        """Record the first failure, for the main thread to raise. After a stop by a signal this process may be saving."""
        with self._changed:
            if self._failure is None:
                self._failure = failure
                if failure.exit_code < STOPPED:
                    threading.Thread(target=self._end, args=(failure,), daemon=True).start()
            self._changed.notify_all()

    def _end(self, failure: SmaltiError) -> None:
        """End a training that hangs in a collective with a lost process."""
        time.sleep(LEAVE_SECONDS)
        if self._trains:
            self._say(failure)
            os._exit(failure.exit_code)


def _serve(meeting: ranks.Meeting) -> socket.socket:
    """Listen on the first free port; on all addresses if processes connect from other machines."""
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


class Launched:
    """Shards on the processes of a launch: a dask cluster that starts with the first shards, of which process 0 is the client.

    Every process works in a thread, so that a device is used by the process to which the launcher assigned it.
    workers: local processes that work instead of process 0, if any.
    """

    def __init__(self, followers: Followers, *, workers: int, around: ExitStack):
        self._followers, self._workers, self._around = followers, workers, around
        self._started: Dask | None = None

    def map(
        self, function: Callable[[int], Any], numbers: Iterable[int], *, folder: Path, say: Callable[[str], None]
    ) -> Generator[Outcome, None, None]:
        waiting = list(numbers)
        if waiting and self._started is None:
            self._started = Dask(self._around.enter_context(_scheduler(self._workers)))
            self._followers.work_for(int(self._started.client.scheduler.address.rpartition(":")[2]))
        if self._started is not None and waiting:
            yield from self._started.map(function, waiting, folder=folder, say=say)


@contextmanager
def launched(followers: Followers, *, workers: int) -> Iterator[Launched]:
    with ExitStack() as around:
        yield Launched(followers, workers=workers, around=around)


@contextmanager
def _scheduler(workers: int) -> Iterator[Any]:
    """A client of a new scheduler that processes on other machines can reach, with the workers of this process."""
    from dask.distributed import Client, LocalCluster

    silence_dask()
    own: dict[str, Any] = {} if workers else {"processes": False, "memory_limit": 0}
    own |= {"protocol": "tcp://", "host": "127.0.0.1" if ranks.meeting().is_one_host else "0.0.0.0"}
    with (
        LocalCluster(n_workers=workers or 1, **own, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        yield client
