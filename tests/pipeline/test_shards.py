"""Shards and where they run: in process, local workers, a scheduler of its own with a worker that dies: the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sweep import tree_bytes
from tiny_stages import load, run_all

from pipeline.cluster import TRIES, Cluster, Dask, InProcess, connect
from pipeline.errors import CannotWrite, InputError, MemoryExhausted, StorageError, UsageError, WorkerError
from pipeline.runner import Options
from pipeline.shards import raise_failures, shard_sizes, unit_name
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


@pytest.mark.parametrize(("rows", "per_shard"), [(1, 1), (7, 2), (8, 2), (3, 10)])
def test_sizes_add_up(rows: int, per_shard: int) -> None:
    sizes = shard_sizes(rows, per_shard)
    assert sum(sizes) == rows
    assert set(sizes[:-1]) <= {per_shard}
    assert 0 < sizes[-1] <= per_shard


def test_two_local_workers_give_the_same_bytes(tmp_path: Path, two_workers: Cluster, want: dict[str, str]) -> None:
    assert numbers(tmp_path, Options(cluster=two_workers)) == want


def test_a_worker_that_dies_once_costs_nothing(tmp_path: Path, two_workers: Cluster, want: dict[str, str]) -> None:
    mark = tmp_path / "died"
    assert numbers(tmp_path, Options(cluster=two_workers), "numbers.fault=die-once", f"numbers.mark={mark}") == want
    assert mark.exists()


def test_a_worker_that_keeps_dying_is_70_and_names_the_shard(tmp_path: Path, two_workers: Cluster) -> None:
    with pytest.raises(
        WorkerError, match=r"shard 2 of 5 failed, the others are kept: the worker of shard 2 kept dying"
    ) as caught:
        numbers(tmp_path, Options(cluster=two_workers), "numbers.fault=die", "numbers.faulty=2")
    assert caught.value.exit_code == 70
    assert kept_units(tmp_path) == {0, 1, 3, 4}


@pytest.mark.parametrize("where", ["here", "workers"])
@pytest.mark.parametrize(
    ("fault", "kind", "words"), [("raise", WorkerError, "never works"), ("input", InputError, "row 3 is no number")]
)
def test_a_failing_shard_is_named_and_does_not_stop_the_others(
    tmp_path: Path, two_workers: Cluster, where: str, fault: str, kind: type[Exception], words: str
) -> None:
    options = Options(cluster=InProcess() if where == "here" else two_workers)
    with pytest.raises(kind, match=f"^shard 1 of 5 failed, the others are kept: .*{words}"):
        numbers(tmp_path, options, f"numbers.fault={fault}")
    assert kept_units(tmp_path) == {0, 2, 3, 4}


def kept_units(folder: Path) -> set[int]:
    (draft,) = Store(folder / "store").drafts()
    return {int(path.parent.name) for path in draft.glob("numbers/c/*/0")}


@contextmanager
def own_cluster(folder: Path, *, workers: int) -> Iterator[tuple[Dask, list[subprocess.Popen[bytes]]]]:
    """A scheduler and workers as processes of their own, started by hand; nobody restarts a killed one."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "faults")])
    file = folder / "scheduler.json"
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> None:
        command = [sys.executable, "-m", f"distributed.cli.{words[0]}", "--scheduler-file", str(file), *words[1:]]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, cwd=folder, **silent))

    try:
        start("dask_scheduler", "--port", "0", "--host", "127.0.0.1", "--no-dashboard")
        for _ in range(workers):
            start("dask_worker", "--no-nanny", "--nthreads", "1", "--no-dashboard")
        with connect(scheduler=scheduler_address(file)) as cluster:
            assert isinstance(cluster, Dask)
            cluster.client.wait_for_workers(workers, timeout=60)
            yield cluster, started
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_an_own_scheduler_with_a_worker_killed_half_way(tmp_path: Path, want: dict[str, str]) -> None:
    mark = tmp_path / "died"
    with own_cluster(tmp_path, workers=2) as (cluster, started):
        found = numbers(tmp_path, Options(cluster=cluster), "numbers.fault=die-once", f"numbers.mark={mark}")
        assert [process.poll() for process in started].count(-signal.SIGKILL) == 1
    assert mark.exists()
    assert found == want


@pytest.mark.parametrize(
    ("killed", "kind", "words"), [(0, StorageError, "scheduler is lost"), (1, WorkerError, "no worker has been left")]
)
def test_a_cluster_that_died_is_told_and_what_is_finished_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int, kind: type[Exception], words: str
) -> None:
    monkeypatch.setattr("pipeline.cluster.POLL_SECONDS", 0.5)
    monkeypatch.setattr("pipeline.cluster.DESERTED_SECONDS", 1.0)
    with own_cluster(tmp_path, workers=1) as (cluster, started):
        done = []
        with pytest.raises(kind, match=words):  # noqa: PT012
            for number, _ in cluster.map(partial(pow, 2), range(1000)):
                done.append(number)
                if len(done) == 3:
                    started[killed].kill()
    assert 3 <= len(done) < 1000


def scheduler_address(path: Path) -> str:
    import json

    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return str(json.loads(path.read_text())["address"])


def test_at_most_two_shards_per_worker_are_in_flight(two_workers: Cluster) -> None:
    taken: list[int] = []
    numbers = (taken.append(number) or number for number in range(30))
    most = 0
    for done, (number, outcome) in enumerate(two_workers.map(partial(pow, 2), numbers)):
        assert outcome == 2**number
        most = max(most, len(taken) - done)
    assert len(taken) == 30
    assert most <= 4 + 1  # the one that is handed over is not in flight any more


def test_a_shard_is_tried_again_but_a_statement_about_data_is_not() -> None:
    calls: list[int] = []

    def fail(error: Exception, number: int) -> None:
        calls.append(number)
        raise error

    for error, times in ((ValueError("x"), TRIES), (InputError("x"), 1)):
        calls.clear()
        ((number, outcome),) = InProcess().map(partial(fail, error), [3])
        assert (number, outcome, calls) == (3, error, [3] * times)


def test_a_full_disk_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def refuse(spec: Any, number: int) -> dict[str, bytes]:
        tried.append(number)
        raise CannotWrite("the disk is full")

    monkeypatch.setattr("tiny_stages.count_shard", refuse)
    with pytest.raises(CannotWrite, match=r"^the disk is full"):
        numbers(tmp_path, Options())
    assert tried == [0]


@pytest.mark.parametrize(
    ("failures", "kind", "words"),
    [
        ({4: ValueError("odd"), 2: InputError("bad")}, InputError, "shards 2, 4 of 9 failed, the others are kept: bad"),
        ({7: ValueError("odd")}, WorkerError, "shard 7 of 9 failed, the others are kept: ValueError: odd"),
        ({0: MemoryError()}, MemoryExhausted, "shard 0 of 9"),
        ({0: OSError(5, "Input/output error")}, StorageError, "Input/output error"),
        (dict.fromkeys(range(12), ValueError("odd")), WorkerError, "7, 8, 9, ... of 9"),
    ],
)
def test_failures_become_one_sentence_of_the_first_kind(
    failures: dict[int, Exception], kind: type[Exception], words: str
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
