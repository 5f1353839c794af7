"""Two processes of one launch, as torchrun tells them of each other, on this machine."""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

DIED = 9

Work = Callable[[Path, int], dict[str, Any]]
"""(folder of this process, rank) -> a report in plain values."""


def run_two(folder: Path, work: Work, *, dies: bool = False) -> list[dict[str, Any]]:
    """What `work` reports in each of two processes; with `dies`, both have to leave by `die()`, and report nothing."""
    port = free_port()
    children = [os.fork() or _replica(folder, work, rank, port) for rank in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == ([DIED, DIED] if dies else [0, 0])
    return [] if dies else [json.loads((folder / f"report-{rank}.json").read_text()) for rank in range(2)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def told(rank: int, port: int) -> dict[str, str]:
    """What a launcher says in the environment."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in numbers.items()}}


def die() -> NoReturn:
    """Leave as if killed."""
    os._exit(DIED)


def _replica(folder: Path, work: Work, rank: int, port: int) -> NoReturn:
    try:
        os.environ.update(told(rank, port))
        report = work(folder / f"rank-{rank}", rank)
        (folder / f"report-{rank}.json").write_text(json.dumps(report))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
