"""What every stage promises, ready to be asked of one: whole after any crash, the same on workers, honest about bad input.

A test gives a function `make_in(store folder) -> Artifact` that makes the stage's artifact of a tiny config there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked child hangs in OpenMP that had more threads

import numpy as np
import torch
import zarr
from PIL import Image

from pipeline import durable, ranks
from pipeline.artifact import LOG, MANIFEST, Artifact, verify_artifact
from pipeline.cluster import Cluster, InProcess, connect
from pipeline.config import parse_config
from pipeline.errors import SmaltiError, WorkerError
from pipeline.following import follow
from pipeline.launch import ARRIVAL_SECONDS, Followers
from pipeline.runner import Options, make, make_request
from pipeline.stage import Inputs, Stage
from pipeline.store import Store
from stages import MODULES

torch.set_num_threads(1)

MakeIn = Callable[[Path], Artifact]
CRASHED = 137
PARALLEL = 2


def run_stage(
    name: str,
    store: Path,
    config: Mapping[str, Any] | None = None,
    *,
    inputs: Mapping[str, Artifact | list[Artifact]] | None = None,
    paths: Mapping[str, Path] | None = None,
    cluster: Cluster | None = None,
    **options: Any,
) -> Artifact:
    """The artifact of one stage, made in `store` as the command line would make it.

    In a process that follows another (`tests.two_processes`): the one that process 0 has made.
    """
    declared = find_stage(name)
    parsed, given = parse_config(declared.config, config or {}, where=name), Inputs(inputs or {})
    if not ranks.is_first():
        follow({name: declared}, explain=as_worker_error, say=print)
        return Store(store).open(name, make_request(declared, parsed, given, paths or {}).key)
    followers = Followers.listen(say=print)
    chosen = Options(cluster=cluster or InProcess(), followers=followers, device="cpu", **options)
    try:
        return make(Store(store), declared, parsed, given, paths or {}, chosen).artifact
    finally:
        followers.dismiss(patience=ARRIVAL_SECONDS)


def as_worker_error(error: Exception) -> SmaltiError:
    """What the command line would say of an error in another process."""
    return error if isinstance(error, SmaltiError) else WorkerError(f"{type(error).__name__}: {error}")


def find_stage(name: str) -> Stage:
    """One stage's declaration, without importing the others."""
    declared: Stage = next(
        value
        for value in vars(import_module(MODULES[name])).values()
        if isinstance(value, Stage) and value.name == name
    )
    return declared


def draw_folder(root: Path, *, classes: int = 2, images: int = 8, pixels: int = 16, seed: int = 0) -> Path:
    """A folder of smooth little PNG images in ImageNet layout; the class sets where the bright spot lies."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:pixels, :pixels] / pixels
    for label in range(classes):
        folder = root / f"class-{label}"
        folder.mkdir(parents=True)
        for number in range(images):
            middle = (label + 0.5) / classes + generator.normal(0, 0.05, 2)
            spot = np.exp(-((x - middle[0]) ** 2 + (y - middle[1]) ** 2) * 12)
            noisy = np.clip(
                spot[..., None] * generator.uniform(0.6, 1, 3) + generator.normal(0, 0.03, (*x.shape, 3)), 0, 1
            )
            Image.fromarray((noisy * 255).astype(np.uint8)).save(folder / f"{number:03d}.png")
    return root


def index_folder(root: Path, store: Path) -> Artifact:
    """The image set of a folder that `draw_folder` made."""
    return run_stage("index", store, {"source": {"kind": "folder"}}, paths={"images": root})


def check_same_bytes(one: Artifact, other: Artifact) -> None:
    """Both are whole, and equal in every byte of manifest and data."""
    assert (other.path / MANIFEST).read_bytes() == (one.path / MANIFEST).read_bytes()
    verify_artifact(one.path)
    verify_artifact(other.path)


def check_every_crash(make_in: MakeIn, tmp_path: Path, *, most: int = 10_000) -> int:
    """Killed at each call of the commit protocol and run again, the artifact is that of an undisturbed run.

    most: with more calls than this, as many are chosen evenly, the first and the last among them.  Returns their number.
    """
    whole = make_in(tmp_path / "whole")
    calls = count_calls(lambda: make_in(tmp_path / "counted"))
    chosen = sorted({round(call) for call in np.linspace(1, calls, min(calls, most))})
    for call in chosen:
        store = tmp_path / f"crash-{call}"
        code = crash_at(call, lambda store=store: make_in(store))  # type: ignore[misc]
        assert code == CRASHED, f"the child should have been killed at call {call} of {calls}, but left with {code}"
        check_same_bytes(whole, make_in(store))
        check_no_litter(store)
    return len(chosen)


def count_calls(action: Callable[[], object]) -> int:
    """How often an action calls the commit protocol, as its process sees it."""
    seen: list[str] = []
    with watching(lambda what, path: seen.append(what)):
        action()
    return len(seen)


def crash_at(call: int, action: Callable[[], object]) -> int:
    """Exit code of a child process that dies like killed at the given call of the commit protocol."""
    child = os.fork()
    if child == 0:
        left = iter(range(call - 1))
        with watching(lambda what, path: None if next(left, None) is not None else os._exit(CRASHED)):
            try:
                action()
            finally:
                os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def watching(watcher: Callable[[str, Path], None]) -> Iterator[None]:
    before, durable.watch = durable.watch, watcher
    try:
        yield
    finally:
        durable.watch = before


def check_no_litter(store: Path) -> None:
    """No draft, and no temporary file in an artifact. A lock's file may stay, since only flock counts; so may a log's."""
    entries = [entry for stage in store.iterdir() for entry in stage.iterdir()]
    assert [entry.name for entry in entries if entry.name.startswith(".")] == []
    temporary = [path for path in store.rglob(f"*{durable.TEMPORARY}") if path.parent.name != LOG]
    assert temporary == []


@contextmanager
def two_workers() -> Iterator[Cluster]:
    """A local dask cluster of two processes: takes seconds to start, so share it within a module."""
    with connect(workers=PARALLEL) as cluster:
        yield cluster


def flip_bit(path: Path, *, place: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << (place % 8)
    path.write_bytes(bytes(data))


def zarr_members(artifact: Artifact) -> list[str]:
    """The arrays that zarr lists in an artifact, without a warning about the files beside them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return sorted(zarr.open_group(artifact.path, mode="r"))
