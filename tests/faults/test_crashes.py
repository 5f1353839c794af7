"""Rows 1 and 10-12 of the promised faults, on the tiny stages: killed, full, read-only."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sweep import check_store, in_child, kill_at_moments, limit_file_size, store_digests, sweep
from tiny_stages import load, recipe_file, run_all

from pipeline.artifact import verify_artifact
from pipeline.errors import CannotWrite
from pipeline.runner import Options, plan
from pipeline.store import Store

ROOT = Path(__file__).parents[2]
TINY = [sys.executable, str(ROOT / "tests" / "faults" / "tiny_command.py")]


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def digests(folder: Path, *settings: str, force: bool = False):
    recipe = load(folder, *settings)
    return lambda store: {
        name: artifact.digest for name, artifact in run_all(recipe, store, Options(force=force)).items()
    }


def test_killed_at_every_call_of_the_commit_protocol(tmp_path: Path) -> None:
    assert sweep(digests(tmp_path, "numbers.rows=3"), tmp_path) > 60


def test_killed_while_force_swaps_a_finished_artifact(tmp_path: Path) -> None:
    small = ("numbers.rows=1", "sum.verbose=false")
    first, again = digests(tmp_path, *small), digests(tmp_path, *small, force=True)
    finished = tmp_path / "finished"
    first(finished)

    def swap(store: Path) -> dict[str, str]:
        if not store.exists():
            shutil.copytree(finished, store)
        return again(store)

    sweep(swap, tmp_path)


@pytest.mark.parametrize("limit", [0, 3, 40, 200])
def test_a_full_disk_is_73_and_the_rest_continues(tmp_path: Path, limit: int) -> None:
    run, store = digests(tmp_path), tmp_path / "store"
    old = digests(tmp_path, "numbers.seed=5")
    old(store)
    before = store_digests(store)
    assert in_child(lambda: run(store), before=lambda: limit_file_size(limit)) == 73
    assert store_digests(store) == before
    assert not list(store.rglob("*-*.partial")), "temporary files of what could not be written"
    assert run(store) == run(tmp_path / "other")


def test_a_full_disk_keeps_the_finished_units(tmp_path: Path) -> None:
    run, store = digests(tmp_path, "numbers.rows=400", "numbers.shard_rows=100"), tmp_path / "store"
    in_child(lambda: run(store), before=lambda: limit_file_size(2500))  # the journal outgrows it after some shards
    units = [path for path in store.rglob(".*.partial/numbers/c/*/0") if path.stat().st_size]
    inodes = {path.name: path.stat().st_ino for path in units}
    run(store)
    assert all(path.stat().st_ino in inodes.values() for path in units if path.exists())
    assert run(store) == run(tmp_path / "other")


def test_a_store_below_a_file_is_refused_before_any_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("tiny_stages.map_shards", lambda *args, **kwargs: pytest.fail("it computed"))
    with pytest.raises(CannotWrite, match="is a file"):
        run_all(load(tmp_path), tmp_path / "file" / "store")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_draft_that_continues(tmp_path: Path, number: signal.Signals, code: int) -> None:
    recipe, store = recipe_file(tmp_path), tmp_path / "store"
    words = [*TINY, "run", str(recipe), "--store", str(store), "--set", "sum.seconds=20"]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a shell starts what runs behind it deaf to SIGINT
    )
    wait_for(lambda: list(store.glob("add/.*.partial/journal.jsonl")), process)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "")
    assert "the same command continues" in err
    assert "Traceback" not in err
    (planned,) = [item for item in plan(load(tmp_path, "sum.seconds=20"), Store(store)) if item.state != "done"]
    assert planned.reason == "continues an interrupted run"
    assert [verify_artifact(path).stage for path in Store(store).artifacts()] == ["count"]


def wait_for(is_there, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 30
    while not is_there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.crash
def test_killed_at_seeded_moments(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    recipe, store = recipe_file(tmp_path), tmp_path / "undisturbed"
    command = [*TINY, "run", str(recipe), "--store", "{store}", "--set", "sum.seconds=0.3"]
    digests(tmp_path, "sum.seconds=0.3")(store)
    kill_at_moments(command, store, tmp_path, kills=request.config.getoption("--kills"))
    check_store(store, store_digests(store))
