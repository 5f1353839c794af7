"""Two processes of one training, as torchrun tells them, on this machine."""

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [os.fork() or _replica(folder, work, rank, port) for rank in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == ([DIED, DIED] if dies else [0, 0])
    return [] if dies else [json.loads((folder / f"report-{rank}.json").read_text()) for rank in range(2)]


def die() -> NoReturn:
    """Leave as if killed."""
    os._exit(DIED)


def _replica(folder: Path, work: Work, rank: int, port: int) -> NoReturn:
    try:
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in told.items()})
        report = work(folder / f"rank-{rank}", rank)
        (folder / f"report-{rank}.json").write_text(json.dumps(report))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
