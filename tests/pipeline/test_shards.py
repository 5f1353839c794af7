"""Shards and where they run: in process, local workers, a scheduler of its own with a worker that dies: the same bytes."""

from __future__ import annotations

import io
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from sweep import tree_bytes
from tiny_stages import load, run_all, slow_process

from pipeline import ranks
from pipeline.artifact import FileEntry
from pipeline.cluster import TRIES, Cluster, Dask, InProcess, attempt, connect
from pipeline.cores import core_count, own_cores
from pipeline.errors import CannotWrite, InputError, MemoryExhausted, SmaltiError, StorageError, UsageError, WorkerError
from pipeline.progress import Progress
from pipeline.runner import Options
from pipeline.shards import check_seen, raise_failures, unit_name
from pipeline.store import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two_workers() -> Iterator[Cluster]:
    with connect(workers=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def want(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bytes of an undisturbed run in this process."""
    return numbers(tmp_path_factory.mktemp("want"), Options())


def numbers(folder: Path, options: Options, *settings: str, mark: Path | None = None) -> dict[str, str]:
    """Run the sharded step; every file with its hash, without what the fault itself changes in the config."""
    found = tree_bytes(run_all(load(folder, "numbers.rows=9", *settings), folder / "store", options)["numbers"].path)
    return {name: value for name, value in found.items() if name.startswith("numbers/")}


def test_two_local_workers_give_the_same_bytes(tmp_path: Path, two_workers: Cluster, want: dict[str, str]) -> None:
    assert numbers(tmp_path, Options(cluster=two_workers)) == want


def test_a_worker_that_dies_once_costs_nothing(tmp_path: Path, two_workers: Cluster, want: dict[str, str]) -> None:
    mark = tmp_path / "died"
    assert numbers(tmp_path, Options(cluster=two_workers), "numbers.fault=die-once", f"numbers.mark={mark}") == want
    assert mark.exists()


def test_a_worker_that_keeps_dying_is_70_and_names_the_shard(tmp_path: Path, two_workers: Cluster) -> None:
    with pytest.raises(
        WorkerError, match=r"shard 2 of 5 failed, finished shards are kept: the worker of shard 2 died in each"
    ) as caught:
        numbers(tmp_path, Options(cluster=two_workers), "numbers.fault=die", "numbers.faulty=2")
    assert caught.value.exit_code == 70
    assert kept_units(tmp_path) == {0, 1, 3, 4}


@pytest.fixture(params=["here", "workers"])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    return InProcess() if request.param == "here" else request.getfixturevalue("two_workers")


def test_a_shard_with_bad_data_is_named_and_does_not_stop_the_others(tmp_path: Path, cluster: Cluster) -> None:
    with pytest.raises(InputError, match=r"^shard 1 of 5 failed, finished shards are kept: row 3 is no number"):
        numbers(tmp_path, Options(cluster=cluster), "numbers.fault=input")
    assert kept_units(tmp_path) == {0, 2, 3, 4}


def test_a_shard_that_raises_is_tried_once_and_shows_where(tmp_path: Path, cluster: Cluster) -> None:
    mark = tmp_path / "raised"
    with pytest.raises(
        WorkerError, match=r"^shard 1 of 5 failed.*RuntimeError: this shard never works \(.*:\d+\)"
    ) as it:
        numbers(tmp_path, Options(cluster=cluster), "numbers.fault=raise", f"numbers.mark={mark}")
    assert mark.read_text() == "x"
    assert str(tmp_path) in str(it.value.path)
    assert f"the traceback is in {it.value.path}" in str(it.value)
    text = Path(str(it.value.path)).read_text()
    assert text.startswith("count, shard 1\nTraceback")
    assert "in misbehave" in text
    assert "this shard never works" in text


def test_an_io_error_that_passes_costs_nothing(tmp_path: Path, cluster: Cluster, want: dict[str, str]) -> None:
    mark = tmp_path / "failed"
    assert numbers(tmp_path, Options(cluster=cluster), "numbers.fault=io-once", f"numbers.mark={mark}") == want
    assert mark.read_text() == "x"


def test_an_io_error_that_stays_is_74_after_some_tries(tmp_path: Path, cluster: Cluster) -> None:
    mark = tmp_path / "failed"
    with pytest.raises(StorageError, match=r"^shard 1 of 5 failed.*Input/output error.*the traceback is in"):
        numbers(tmp_path, Options(cluster=cluster), "numbers.fault=io", f"numbers.mark={mark}")
    assert mark.read_text() == "x" * TRIES
    assert kept_units(tmp_path) == {0, 2, 3, 4}


def kept_units(folder: Path) -> set[int]:
    (draft,) = Store(folder / "store").drafts()
    return {int(path.parent.name) for path in draft.glob("numbers/c/*/0")}


class OwnCluster:
    """A scheduler and workers as processes of their own, started by hand; nobody restarts a killed one."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "scheduler.json"
        self.processes: list[subprocess.Popen[bytes]] = []
        self._start("dask_scheduler", "--port", "0", "--host", "127.0.0.1", "--no-dashboard", folder=folder)

    def add_worker(self, folder: Path, *, before: str = "") -> subprocess.Popen[bytes]:
        """before: a folder whose packages it imports instead of ours."""
        words = ("--no-nanny", "--nthreads", "1", "--no-dashboard")
        return self._start("dask_worker", *words, folder=folder, before=before)

    def _start(self, program: str, *words: str, folder: Path, before: str = "") -> subprocess.Popen[bytes]:
        paths = os.pathsep.join([before, str(ROOT), str(ROOT / "tests" / "faults")])
        command = [sys.executable, "-m", f"distributed.cli.{program}", "--scheduler-file", str(self.file), *words]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, cwd=folder, **silent)
        self.processes.append(process)
        return process

    @property
    def address(self) -> str:
        deadline = time.monotonic() + 60
        while not self.file.exists() or not self.file.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return str(json.loads(self.file.read_text())["address"])

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@contextmanager
def own_cluster(*folders: Path) -> Iterator[tuple[Dask, OwnCluster]]:
    """An own cluster with a worker started in each folder, and the connection to it."""
    own = OwnCluster(folders[0])
    try:
        for folder in folders:
            own.add_worker(folder)
        with connect(scheduler=own.address) as cluster:
            assert isinstance(cluster, Dask)
            cluster.client.wait_for_workers(len(folders), timeout=60)
            yield cluster, own
    finally:
        own.stop()


def test_an_own_scheduler_with_a_worker_killed_half_way(tmp_path: Path, want: dict[str, str]) -> None:
    mark = tmp_path / "died"
    with own_cluster(tmp_path, tmp_path) as (cluster, own):
        found = numbers(tmp_path, Options(cluster=cluster), "numbers.fault=die-once", f"numbers.mark={mark}")
        assert [process.poll() for process in own.processes].count(-signal.SIGKILL) == 1
    assert mark.exists()
    assert found == want


@pytest.mark.parametrize(
    ("killed", "kind", "words"), [(0, StorageError, "scheduler is lost"), (1, WorkerError, "has had no worker")]
)
def test_a_cluster_that_died_is_told_and_what_is_finished_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int, kind: type[Exception], words: str
) -> None:
    monkeypatch.setattr("pipeline.cluster.POLL_SECONDS", 0.2)
    monkeypatch.setattr("pipeline.cluster.SILENT_SECONDS", 0.2)
    monkeypatch.setattr("pipeline.cluster.DESERTED_SECONDS", 1.0)
    said: list[str] = []
    with own_cluster(tmp_path) as (cluster, own):
        done = []
        with pytest.raises(kind, match=words):  # noqa: PT012
            for number, _ in cluster.map(partial(pow, 2), range(1000), folder=tmp_path, say=said.append):
                done.append(number)
                if len(done) == 3:
                    own.processes[killed].kill()
    assert 3 <= len(done) < 1000
    if killed == 1:
        assert "waits for a worker of the dask scheduler at tcp://" in said[-1]


def test_workers_are_used_as_they_come_and_go(tmp_path: Path) -> None:
    """One at the start; a second that joins late; the first is killed and the second does the rest."""
    with own_cluster(tmp_path) as (cluster, own):
        seen: list[int] = []
        own.add_worker(tmp_path)
        shards = cluster.map(slow_process, range(200), folder=tmp_path, say=print)
        for _, process in shards:
            seen.append(process)
            if len(set(seen)) == 2:
                break
        assert len(set(seen)) == 2
        os.kill(seen[0], signal.SIGKILL)
        rest = [process for _, process in islice(shards, 20)]
        assert rest[-10:] == [seen[-1]] * 10
        shards.close()
    assert not list(tmp_path.glob(".nonce-*"))


def test_a_worker_without_our_code_is_named_and_not_used(tmp_path: Path) -> None:
    other = tmp_path / "other" / "pipeline" / "__init__.py"
    other.parent.mkdir(parents=True)
    other.write_text("raise ImportError('another package')")
    said: list[str] = []
    with own_cluster(tmp_path) as (cluster, own):
        own.add_worker(tmp_path, before=str(other.parents[1]))
        shards = cluster.map(slow_process, range(300), folder=tmp_path, say=said.append)
        seen = {process for _, process in takewhile(lambda _: not said, shards)}
        shards.close()
    assert len(seen) == 1
    assert "not used: worker tcp://127.0.0.1:" in said[0]


@dataclass
class Elsewhere:
    """Two workers of one scheduler: one started in `here`, the other in `there`."""

    cluster: Dask
    here: Path
    there: Path


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    here, there = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("there")
    with own_cluster(here, there) as (cluster, _):
        yield Elsewhere(cluster, here, there)


OTHERWISE = Path("/proc/self/cwd")
"""An absolute path that is another folder for each process, as a path may be on another host."""


@dataclass
class Run:
    """What a run of the sharded step gave and said."""

    files: dict[str, str]
    said: list[str]


def run_in(elsewhere: Elsewhere, root: Path, tmp_path: Path, *settings: str) -> Run:
    stream = io.StringIO()
    options = Options(cluster=elsewhere.cluster, progress=Progress(stream))
    made = run_all(load(tmp_path, "numbers.rows=9", *settings), root, options)["numbers"]
    files = {name: value for name, value in tree_bytes(made.path).items() if name.startswith("numbers/")}
    return Run(files, [line for line in stream.getvalue().splitlines() if "not used" in line])


def test_a_relative_store_serves_workers_in_other_folders(
    elsewhere: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, want: dict[str, str]
) -> None:
    monkeypatch.chdir(elsewhere.here)
    before = set(elsewhere.there.iterdir())
    found = run_in(elsewhere, Path("store"), tmp_path)
    assert (found.files, found.said) == (want, [])
    assert set(elsewhere.there.iterdir()) == before
    processes = {
        outcome for _, outcome in elsewhere.cluster.map(slow_process, range(10), folder=tmp_path, say=pytest.fail)
    }
    assert len(processes) == 2


def test_a_worker_that_does_not_see_the_draft_is_named_once_and_not_used(
    elsewhere: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, want: dict[str, str]
) -> None:
    monkeypatch.setattr("pipeline.shared_folder.SEEN_SECONDS", 0.5)
    monkeypatch.chdir(elsewhere.here)
    before = set(elsewhere.there.iterdir())
    said: list[str] = []
    for _ in range(2):
        shards = elsewhere.cluster.map(slow_process, range(15), folder=OTHERWISE, say=said.append)
        assert len({process for _, process in shards}) == 1
    (line,) = said
    assert line.startswith("not used: worker tcp://")
    assert f"(host {platform.node()}, started in {elsewhere.there}) cannot use {OTHERWISE}: it does not see" in line
    found = run_in(elsewhere, OTHERWISE / "seen-by-one", tmp_path)
    assert found.files == want
    assert set(elsewhere.there.iterdir()) == before


def test_where_no_worker_sees_the_draft_nothing_is_computed(
    elsewhere: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (elsewhere.there / "hidden" / "count").mkdir(parents=True)
    started = time.monotonic()
    with pytest.raises(
        StorageError, match=r"2 asked.* cannot use /proc/self/cwd/hidden/count/.*: it does not see"
    ) as caught:
        run_in(elsewhere, OTHERWISE / "hidden", tmp_path)
    assert time.monotonic() - started < 15
    assert caught.value.exit_code == 74
    (draft,) = Store(tmp_path / "hidden").drafts()
    assert {path.name for path in draft.iterdir()} <= {"log", "request.json"}
    assert not list(elsewhere.there.glob("hidden/count/*"))


def test_nothing_is_journaled_that_is_not_seen_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole").write_bytes(b"four")
    (tmp_path / "cut").write_bytes(b"fo")
    check_seen(tmp_path, [FileEntry("whole", 4, "")])
    late = Timer(0.3, partial((tmp_path / "late").write_bytes, b"four"))
    late.start()
    check_seen(tmp_path, [FileEntry("late", 4, "")])
    monkeypatch.setattr("pipeline.shared_folder.SEEN_SECONDS", 0.1)
    for name in ("cut", "missing"):
        with pytest.raises(StorageError, match=f"{name} of 4 bytes, but this process does not see it"):
            check_seen(tmp_path, [FileEntry(name, 4, "")])


def test_one_shard_per_thread_is_in_flight(tmp_path: Path, two_workers: Dask, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, given = two_workers.client.submit, []
    monkeypatch.setattr(
        two_workers.client, "submit", lambda task, *args, **how: given.append(task) or submit(task, *args, **how)
    )
    most = 0
    outcomes = two_workers.map(partial(pow, 2), range(30), folder=tmp_path, say=print)
    for done, (number, outcome) in enumerate(outcomes):
        assert outcome == 2**number
        most = max(most, given.count(attempt) - done)
    assert given.count(attempt) == 30
    assert most <= 2


def test_local_workers_know_their_number_and_share_the_cores(tmp_path: Path, two_workers: Dask) -> None:
    places = two_workers.client.run(lambda: (ranks.local_rank(), ranks.local_world_size()))
    assert sorted(places.values()) == [(0, 2), (1, 2)]
    found = two_workers.map(lambda number: own_cores(), range(2), folder=tmp_path, say=print)
    assert {outcome for _, outcome in found} == {max(1, core_count() // 2)}


def test_only_io_is_tried_again() -> None:
    calls: list[int] = []

    def fail(error: Exception, number: int) -> None:
        calls.append(number)
        raise error

    cases = [
        (ValueError("x"), WorkerError, 1),
        (MemoryError("x"), MemoryExhausted, 1),
        (InputError("x"), InputError, 1),
        (CannotWrite("x"), CannotWrite, 1),
        (OSError("x"), StorageError, TRIES),
        (StorageError("x"), StorageError, TRIES),
    ]
    for error, kind, times in cases:
        calls.clear()
        ((number, outcome),) = InProcess().map(partial(fail, error), [3], folder=Path(), say=print)
        assert (number, type(outcome.error), calls) == (3, kind, [3] * times)


@pytest.mark.parametrize(
    ("error", "kind"), [(CannotWrite("it is full"), CannotWrite), (MemoryError(), MemoryExhausted)]
)
def test_a_full_disk_or_memory_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    tried: list[int] = []

    def refuse(spec: Any, number: int) -> dict[str, bytes]:
        tried.append(number)
        raise error

    monkeypatch.setattr("tiny_stages.count_shard", refuse)
    with pytest.raises(kind, match=r"^shard 0 of 5 failed"):
        numbers(tmp_path, Options())
    assert tried == [0]


@pytest.mark.parametrize(
    ("failures", "kind", "words"),
    [
        ({4: StorageError("odd"), 2: InputError("bad")}, InputError, "shards 2, 4 of 9 failed, finished .* kept: bad"),
        (dict.fromkeys(range(12), WorkerError("odd")), WorkerError, "7, 8, 9, ... of 9"),
    ],
)
def test_failures_become_one_sentence_of_the_first_kind(
    failures: dict[int, SmaltiError], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        raise_failures(failures, 9)


def test_names_of_units_sort_by_number() -> None:
    assert [unit_name(number) for number in (0, 12)] == ["shard-000000", "shard-000012"]


def test_wrong_clusters_are_refused() -> None:
    for options in ({"workers": 2, "scheduler": "tcp://x:1"}, {"workers": -1}):
        with pytest.raises(UsageError), connect(**options):  # type: ignore[arg-type]
            pass
    with (
        pytest.raises(StorageError, match="no dask scheduler answers at nonsense://x"),
        connect(scheduler="nonsense://x"),
    ):
        pass
