"""A connection between two processes of a launch: lines of JSON over TCP, with a heartbeat from either side.

Both sides prove first that they know the key of the launch. What arrives is parsed as JSON and is never unpickled.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

BEAT_SECONDS = 5.0
SILENCE_SECONDS = 60.0
"""After so much silence the other side counts as lost."""
GREETING_SECONDS = 5.0
GREETING_BYTES = 4096
NAME = "smalti launch 1"

Message = dict[str, Any]


class Link:
    """One side of a connection whose greeting is over."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(SILENCE_SECONDS)
        self.address = str(connection.getpeername()[0])
        self._connection = connection
        self._sending = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def send(self, message: Message) -> None:
        """OSError if the other side is gone."""
        with self._sending:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def messages(self) -> Iterator[Message]:
        """What the other side says until it closes. TimeoutError: it was silent too long; OSError: it is gone."""
        with self._connection.makefile("rb") as lines:
            for line in lines:
                if line.endswith(b"\n") and (message := json.loads(line)):
                    yield message

    def close(self) -> None:
        self._closed.set()
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _beat(self) -> None:
        """An empty message now and then."""
        with suppress(OSError):
            while not self._closed.wait(BEAT_SECONDS):
                self.send({})


def greet_follower(connection: socket.socket, key: bytes) -> Message | None:
    """Of process 0: what the other side says of itself (rank, host), or None if it does not know the key."""
    connection.settimeout(GREETING_SECONDS)
    nonce = secrets.token_hex(16)
    _send(connection, {"name": NAME, "nonce": nonce})
    answer = _receive(connection)
    if not _proves(answer, key, "follower", nonce, answer.get("rank"), answer.get("host")):
        return None
    _send(connection, {"proof": _proof(key, "first", str(answer.get("nonce")))})
    return answer


def greet_first(connection: socket.socket, key: bytes, *, rank: int, host: str) -> bool:
    """Of the others: introduce this process; True if the other side is process 0 of this launch."""
    connection.settimeout(GREETING_SECONDS)
    offer = _receive(connection)
    if offer.get("name") != NAME:
        return False
    nonce = secrets.token_hex(16)
    proof = _proof(key, "follower", str(offer.get("nonce")), rank, host)
    _send(connection, {"rank": rank, "host": host, "nonce": nonce, "proof": proof})
    return _proves(_receive(connection), key, "first", nonce)


def _send(connection: socket.socket, message: Message) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> Message:
    """One short line, read byte by byte so that nothing behind it is taken; {} if it is not one of ours."""
    line = b""
    while not line.endswith(b"\n") and len(line) < GREETING_BYTES:
        byte = connection.recv(1)
        if not byte:
            raise ConnectionError("the other side closed the connection")
        line += byte
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _proof(key: bytes, *words: object) -> str:
    return hmac.new(key, json.dumps(words).encode(), "sha256").hexdigest()


def _proves(message: Mapping[str, Any], key: bytes, *words: object) -> bool:
    return hmac.compare_digest(str(message.get("proof")).encode(), _proof(key, *words).encode())
