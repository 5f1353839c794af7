"""Options that several commands share."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.output import print_error
from pipeline.cluster import Cluster, connect
from pipeline.errors import UsageError
from pipeline.launch import Followers, launched
from pipeline.progress import Progress
from pipeline.runner import Options
from pipeline.trees import Memory

StoreOption = Annotated[
    Path, typer.Option("--store", envvar="SMALTI_STORE", help="Folder of artifacts.", show_default="./store")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, without doing it.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Make it again even if it exists; the old one is replaced.")]
NoWaitOption = Annotated[
    bool, typer.Option("--no-wait", help="Exit with code 75 if another process is making the same artifact.")
]
RescanOption = Annotated[
    bool,
    typer.Option("--rescan", help="List image folders again, even where no folder was modified since the last time."),
]
WorkersOption = Annotated[int, typer.Option(min=0, help="Local dask worker processes; 0 works in this process.")]
SchedulerOption = Annotated[str | None, typer.Option(help="Address of a running dask scheduler, tcp://host:8786.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
ThreadsOption = Annotated[
    int,
    typer.Option(
        min=0,
        help="Threads of a training step or of kmeans; 0: those of the draft, or every core but one. Float results of trainings depend on it.",
    ),
]
CheckpointOption = Annotated[
    float,
    typer.Option(
        "--checkpoint-seconds",
        min=0.0,
        help="Least seconds between checkpoints of a training, at least 20 times the duration of the last one; 0: after every step.",
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: dotted.key=value. Repeatable.")
]
ConfigOption = Annotated[str | None, typer.Option(help="YAML file of settings, or RECIPE.yaml:step.")]

DEFAULT_STORE = Path("store")
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")

COMMON: dict[str, tuple[Any, Any]] = {
    "store": (StoreOption, DEFAULT_STORE),
    "device": (DeviceOption, "auto"),
    "threads": (ThreadsOption, 0),
    "workers": (WorkersOption, 0),
    "scheduler": (SchedulerOption, None),
    "checkpoint_seconds": (CheckpointOption, 30.0),
    "no_wait": (NoWaitOption, False),
    "force": (ForceOption, False),
    "rescan": (RescanOption, False),
    "dry_run": (DryRunOption, False),
    "quiet": (QuietOption, False),
    "json": (JsonOption, False),
}
"""name -> (annotation, default) of the options that every running command takes."""


@contextmanager
def running(values: dict[str, Any]) -> Iterator[Options]:
    """The runner's options from the common ones, with the cluster connected."""
    if not DEVICE.fullmatch(values["device"]):
        raise UsageError(f"--device {values['device']}: expected auto, cpu, cuda or cuda:N")
    progress = Progress.on_stderr(quiet=values["quiet"])
    with _cluster(values["workers"], values["scheduler"], progress.say) as cluster:
        yield Options(
            cluster=cluster,
            followers=followers(),
            progress=progress,
            device=values["device"],
            threads=values["threads"],
            checkpoint_seconds=values["checkpoint_seconds"],
            wait=not values["no_wait"],
            force=values["force"],
            memory=Memory(values["store"].absolute(), rescan=values["rescan"]),
            command=shlex.join(["smalti", *sys.argv[1:]]),
        )


@cache
def followers() -> Followers:
    """The other processes of this launch; the first call starts to listen for them."""
    return Followers.listen(say=lambda error: print_error(error, error.exit_code, as_json="--json" in sys.argv))


def _cluster(workers: int, scheduler: str | None, say: Callable[[str], None]) -> AbstractContextManager[Cluster]:
    if followers().count and not scheduler:
        return launched(followers(), workers=workers)
    return connect(workers=workers, scheduler=scheduler, say=say)


def parse_paths(pairs: list[str] | None, images: Path | None) -> dict[str, str]:
    """`--path name=PATH` and `--images DIR` as a mapping."""
    found = {} if images is None else {"images": str(images)}
    for pair in pairs or []:
        name, equals, path = pair.partition("=")
        if not equals or not path:
            raise UsageError(f"--path {pair!r}: expected name=PATH")
        found[name] = path
    return found
