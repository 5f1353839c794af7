"""The rank of this process, from the environment of `torchrun` and `accelerate launch` (no torch here)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import sha256

from pipeline.errors import UsageError

PORTS = 16  # tried one after the other, from the one after the launcher's


@dataclass(frozen=True)
class Meeting:
    """The address of process 0.

    ports: process 0 listens on the first free one.  key: a secret of this launch.
    """

    host: str
    ports: tuple[int, ...]
    key: bytes
    is_one_host: bool


def rank() -> int:
    return _number("RANK", 0)


def world_size() -> int:
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Number of this process among those of the launch on this machine."""
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Number of processes of the launch on this machine; default 1."""
    return _number("LOCAL_WORLD_SIZE", 1)


def take_place(number: int, count: int) -> None:
    """Make this process number `number` of `count` on this machine, as a launcher would."""
    os.environ |= {"LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": str(count)}


def is_first() -> bool:
    return rank() == 0


def meeting() -> Meeting:
    """The address, from the launcher's environment. UsageError where that has none."""
    port = _number("MASTER_PORT", 0)
    if not port or not os.environ.get("MASTER_ADDR"):
        raise UsageError(
            f"the environment has WORLD_SIZE={world_size()} but not MASTER_ADDR and MASTER_PORT",
            hint="start several processes with torchrun or accelerate launch",
        )
    is_one_host = local_world_size() == world_size()
    names = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]
    return Meeting(
        host="127.0.0.1" if is_one_host else os.environ["MASTER_ADDR"],
        ports=tuple(1024 + (port - 1023 + number) % (65536 - 1024) for number in range(PORTS)),
        key=sha256("\n".join(["smalti", *names, str(port), str(world_size())]).encode()).digest(),
        is_one_host=is_one_host,
    )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(f"the environment variable {name} is {text!r}, expected a number") from error
