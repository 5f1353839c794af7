"""Crash tests for anything that makes artifacts: kill it at every call of the commit protocol, or at seeded moments.

    sweep(run, tmp_path)                     run: function (store folder) -> {artifact name: digest of its manifest}
    kill_at_moments(command, ..., kills=2)   the same by SIGKILL of a subprocess from outside

Whatever the moment, the same call afterwards must give the artifacts of an undisturbed run, byte for byte.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline import durable
from pipeline.artifact import DIGEST, LOG, verify_artifact
from pipeline.store import Store

Run = Callable[[Path], dict[str, str]]


def sweep(run: Run, folder: Path, *, points: Iterable[int] | None = None) -> int:
    """Kill `run` in a forked process at its k-th call of the protocol, for every k (or those of `points`), and run it again.

    Returns the number of calls. `run` must not start threads before the fork that it needs after it (torch: one thread).
    """
    with without_fsync():
        want = run(folder / "undisturbed")
        digests = store_digests(folder / "undisturbed")
        calls = count_calls(run, folder / "counted")
        for point in range(calls) if points is None else sorted({point % calls for point in points}):
            store = folder / f"killed-{point}"
            killed = in_child(lambda store=store: run(store), before=lambda point=point: watch_calls(point))
            assert killed == -signal.SIGKILL, f"call {point} of {calls} was not reached"
            assert run(store) == want, f"killed at call {point} of {calls}"
            check_store(store, digests)
            shutil.rmtree(store)
    return calls


@contextmanager
def without_fsync() -> Iterator[None]:
    """A killed process loses nothing that the kernel has: fsync is for power cuts, and takes nine tenths of the time."""
    kept, os.fsync = os.fsync, lambda descriptor: None
    try:
        yield
    finally:
        os.fsync = kept


def count_calls(run: Run, folder: Path) -> int:
    seen: list[str] = []
    durable.watch = lambda what, path: seen.append(what)
    try:
        run(folder)
    finally:
        durable.watch = None
    return len(seen)


def watch_calls(point: int) -> None:
    """Kill this process at call number `point`."""
    left = [point]

    def seen(what: str, path: Path) -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    durable.watch = seen


def in_child(action: Callable[[], object], *, before: Callable[[], None] = lambda: None) -> int:
    """Exit code of `action` in a forked process: 0, the error's exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            before()
            action()
            code = 0
        except BaseException as error:
            code = getattr(error, "exit_code", 99)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def limit_file_size(count: int) -> None:
    """A disk that is full beyond `count` bytes per file: writing more fails with EFBIG."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def kill_at_moments(command: Sequence[str], store: Path, folder: Path, *, kills: int, seed: int = 0) -> None:
    """SIGKILL `command` at `kills` seeded moments, each in a new store, and let the next call finish undisturbed.

    command: words, in which {store} stands for the store's folder.  store: that of an undisturbed run of it.
    """
    want = store_digests(store)
    chance = random.Random(seed)
    seconds = duration(command, folder / "timed")
    for kill in range(kills):
        root = folder / f"kill-{kill}"
        process = start(command, root)
        time.sleep(chance.uniform(0.0, seconds))
        process.kill()
        process.wait()
        assert start(command, root).wait() == 0, f"killed at moment {kill} of seed {seed}"
        check_store(root, want)
        shutil.rmtree(root)


def duration(command: Sequence[str], store: Path) -> float:
    started = time.monotonic()
    assert start(command, store).wait() == 0
    shutil.rmtree(store)
    return time.monotonic() - started


def start(command: Sequence[str], store: Path) -> subprocess.Popen[bytes]:
    words = [word.replace("{store}", str(store)) for word in command]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def store_digests(root: Path) -> dict[str, str]:
    """Artifact -> digest of its manifest; every byte of every artifact is verified."""
    return {f"{path.parent.name}/{path.name}": verify_artifact(path).digest for path in Store(root).artifacts()}


def check_store(root: Path, want: dict[str, str]) -> None:
    """The store holds exactly these artifacts, whole, and nothing half-made."""
    assert store_digests(root) == want
    names = [path.name for path in root.rglob("*") if LOG not in path.parts and "refs" not in path.parts]
    assert not [name for name in names if name.endswith((durable.TEMPORARY, ".replaced"))]


def tree_bytes(root: Path) -> dict[str, str]:
    """Every file of an artifact except its log: name -> SHA-256."""
    files = [path for path in root.rglob("*") if path.is_file() and path.relative_to(root).parts[0] != LOG]
    assert (root / DIGEST) in files
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
