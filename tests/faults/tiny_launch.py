"""A process of a launch that maps numbers and runs the tiny recipe: `PYTHONPATH=. python tiny_launch.py FOLDER WORKERS`.

It prints one JSON object: which processes computed, which made a scheduler, and the digest of the sharded artifact.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import tiny_stages
from dask.distributed import Scheduler

from pipeline import ranks
from pipeline.following import follow
from pipeline.launch import ARRIVAL_SECONDS, Followers, launched
from pipeline.runner import Options

schedulers: list[int] = []
begin = Scheduler.__init__


def count_scheduler(self: Any, *args: Any, **more: Any) -> None:
    schedulers.append(os.getpid())
    begin(self, *args, **more)


def lead(folder: Path, workers: int) -> dict[str, Any]:
    others = Followers.listen(print)
    with launched(others, workers=workers) as cluster:
        mapped = cluster.map(tiny_stages.slow_process, range(20), folder=folder, say=print)
        processes = {process for _, process in mapped}
        made = tiny_stages.run_all(tiny_stages.load(folder), folder / "store", Options(cluster, others))
    others.dismiss(patience=ARRIVAL_SECONDS)
    return {"processes": sorted(processes), "digest": made["numbers"].digest}


def main(folder: Path, workers: int) -> None:
    Scheduler.__init__ = count_scheduler
    told = lead(folder, workers) if ranks.is_first() else {"code": follow({}, explain=repr, say=print)}
    json.dump({"process": os.getpid(), "schedulers": len(schedulers), **told}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
