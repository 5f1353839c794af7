"""Garbage: only what nothing needs, never the inputs of what is being made; what is said to be removed is removed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_stages
from sweep import check_store, in_child
from tiny_stages import load, run_all

from pipeline.artifact import MANIFEST, Artifact, verify_artifact
from pipeline.draft import REQUEST
from pipeline.errors import CorruptError
from pipeline.garbage import survey, sweep
from pipeline.locks import lock, steady
from pipeline.runner import Options, make
from pipeline.stage import Inputs
from pipeline.store import Store

FORK = multiprocessing.get_context("fork")
HOUR = 3600.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def made(store: Store, tmp_path: Path) -> dict[str, Artifact]:
    return run_all(load(tmp_path), store.root)


def paths(store: Store, **options: float) -> set[Path]:
    return {item.path for item in survey(store, **options).garbage}


def forget(store: Store, *steps: str) -> None:
    for step in steps:
        (store.root / "refs/tiny" / step).unlink()


def age(path: Path, seconds: float) -> None:
    """As if everything here had been written so long ago."""
    for file in [path, *path.rglob("*")]:
        os.utime(file, (time.time() - seconds, time.time() - seconds))


def start_sum(store: Store, numbers: Artifact, *, seconds: float = 0.0, die_at: str = "") -> None:
    """Make a sum of these numbers, without a ref: slowly, or only to the unit `die_at`."""

    def add(config: tiny_stages.AddConfig, inputs: Inputs, out: object, run: object) -> None:
        tiny_stages.add.function(config, inputs, out, run)  # type: ignore[arg-type]
        if die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    config = tiny_stages.AddConfig(scale=7.0, seconds=seconds)
    make(store, replace(tiny_stages.add, function=add), config, Inputs({"numbers": numbers}), {}, Options())


@contextmanager
def running_sum(store: Store, numbers: Artifact) -> Iterator[multiprocessing.process.BaseProcess]:
    """Another process that makes a sum for some seconds, seen to have begun."""
    process = FORK.Process(target=start_sum, args=(store, numbers), kwargs={"seconds": 3.0})
    process.start()
    while not list(store.root.glob("add/.*.partial/journal.jsonl")):
        assert process.is_alive()
        time.sleep(0.02)
    try:
        yield process
    finally:
        process.join(30)


def test_what_a_ref_reaches_through_inputs_stays(store: Store, made: dict[str, Artifact], tmp_path: Path) -> None:
    second = run_all(load(tmp_path, "sum.scale=3.0"), store.root)
    assert second["numbers"].key == made["numbers"].key
    assert paths(store) == {made["sum"].path}
    forget(store, "numbers")
    assert paths(store) == {made["sum"].path}
    assert survey(store).garbage[0].bytes > 0
    assert survey(store).kept == {"named": 2}
    forget(store, "sum")
    assert paths(store) == {item.path for item in [*made.values(), *second.values()]}


def test_what_is_young_stays_with_its_inputs(store: Store, made: dict[str, Artifact]) -> None:
    forget(store, "numbers", "sum")
    age(made["numbers"].path, 2 * HOUR)
    assert survey(store, older_than=HOUR).kept == {"young": 2}
    age(made["sum"].path, 2 * HOUR)
    assert paths(store, older_than=HOUR) == {item.path for item in made.values()}
    assert paths(store, older_than=3 * HOUR) == set()


def test_beside_a_running_step_its_inputs_stay(store: Store, made: dict[str, Artifact]) -> None:
    """Neither is named by a ref, and the draft is locked by another process."""
    forget(store, "numbers", "sum")
    with running_sum(store, made["numbers"]) as process:
        assert survey(store).kept == {"running": 2}
        assert [item.path for item in sweep(store)] == [made["sum"].path]
        assert process.is_alive()
    assert process.exitcode == 0
    assert verify_artifact(made["numbers"].path)
    assert [path.parent.name for path in store.artifacts()] == ["add", "count"]


def test_an_interrupted_step_is_kept_with_its_inputs_and_continues(store: Store, made: dict[str, Artifact]) -> None:
    forget(store, "numbers", "sum")
    assert in_child(lambda: start_sum(store, made["numbers"], die_at="end")) == -signal.SIGKILL
    (draft,) = store.drafts()
    age(store.root, 9 * HOUR)
    assert survey(store).kept == {"interrupted": 2}
    assert [item.path for item in sweep(store)] == [made["sum"].path]
    start_sum(store, made["numbers"])
    assert not draft.exists()


def test_an_interrupted_step_can_be_given_up_when_it_is_old(store: Store, made: dict[str, Artifact]) -> None:
    in_child(lambda: start_sum(store, made["numbers"], die_at="end"))
    (draft,) = store.drafts()
    assert paths(store, drafts=True, older_than=HOUR) == set()
    age(draft, 2 * HOUR)
    assert paths(store, older_than=HOUR) == set()
    assert [item.path for item in sweep(store, drafts=True, older_than=HOUR)] == [draft]
    check_store(store.root, {f"{item.stage}/{item.key}": item.digest for item in made.values()})


def test_a_draft_says_what_it_reads_and_what_it_is_called(store: Store, tmp_path: Path) -> None:
    numbers = run_all(load(tmp_path), store.root)["numbers"]
    in_child(lambda: start_sum(store, numbers, die_at="end"))
    note = json.loads((store.drafts()[0] / REQUEST).read_text())
    assert note["inputs"] == {"numbers": {"stage": "count", "key": numbers.key, "digest": numbers.content}}
    recipe = load(tmp_path, "sum.scale=9.0", "sum.seconds=60.0")
    child = FORK.Process(target=run_all, args=(recipe, store.root))
    child.start()
    while not (drafts := store.find_drafts("tiny/sum")):
        time.sleep(0.02)
    child.kill()
    child.join()
    assert (drafts[0].parent.name, drafts[0].suffix) == ("add", ".partial")


def test_a_draft_whose_input_is_another_one_now_begins_anew(store: Store, made: dict[str, Artifact]) -> None:
    """The same key, since the key of an input does not change; but its bytes did."""
    in_child(lambda: start_sum(store, made["numbers"], die_at="end"))
    (draft,) = store.drafts()
    note = json.loads((draft / REQUEST).read_text())
    note["inputs"]["numbers"]["digest"] = "0" * 64
    (draft / REQUEST).write_text(json.dumps(note))
    (draft / "sum.txt").write_text("of other numbers")
    start_sum(store, made["numbers"])
    total = float((made["sum"].path / "sum.txt").read_text()) / 2
    (sum_,) = [path for path in store.artifacts() if path.parent.name == "add" and path != made["sum"].path]
    assert float((sum_ / "sum.txt").read_text()) == 7 * total


def test_sweeping_takes_strays_and_dead_locks_and_leaves_what_is_reached(
    store: Store, made: dict[str, Artifact]
) -> None:
    dead = store.lock_path("count", "f" * 64)
    in_child(lambda: hold_and_die(dead))
    assert dead.exists()
    (store.root / "refs/tiny/sum.99-dead.partial").touch()
    replaced = store.root / "count" / f".{made['numbers'].key}.replaced"
    replaced.mkdir()
    assert [item.path for item in sweep(store)] == [replaced]
    names = {path.relative_to(store.root).parts[:2] for path in store.root.rglob("*") if path.is_file()}
    assert names == {("count", made["numbers"].key), ("add", made["sum"].key), ("refs", "tiny")}
    check_store(store.root, {f"{item.stage}/{item.key}": item.digest for item in made.values()})


def test_folders_of_somebody_else_are_no_garbage(store: Store) -> None:
    (store.root / "photos" / "2026").mkdir(parents=True)
    assert survey(store).garbage == []


def hold_and_die(path: Path) -> None:
    with lock(path, wait=True):
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_somebody_holds_is_not_said_to_be_removed(store: Store, made: dict[str, Artifact]) -> None:
    forget(store, "sum")
    with lock(store.lock_path("add", made["sum"].key), wait=True):
        assert paths(store) == {made["sum"].path}
        assert sweep(store) == []
    assert [item.path for item in sweep(store)] == [made["sum"].path]


def test_a_swap_killed_in_the_middle_survives_the_sweep(
    store: Store, made: dict[str, Artifact], tmp_path: Path
) -> None:
    numbers = made["numbers"]
    numbers.path.rename(store.partial("count", numbers.key))  # the moment between the two renames
    assert sweep(store, drafts=True) == []
    assert run_all(load(tmp_path), store.root)["numbers"].digest == numbers.digest


def test_what_was_moved_aside_goes_when_it_is_old(store: Store, made: dict[str, Artifact], tmp_path: Path) -> None:
    age(made["sum"].path, 9 * HOUR)
    (made["sum"].path / "sum.txt").unlink()
    run_all(load(tmp_path), store.root)
    aside = made["sum"].path.with_name(f".{made['sum'].key}.damaged-1")
    assert survey(store, older_than=HOUR).kept == {"named": 2, "young": 1}
    assert [item.path for item in sweep(store)] == [aside]
    assert verify_artifact(made["sum"].path)


def test_an_artifact_that_cannot_say_what_it_reads_stops_it(store: Store, made: dict[str, Artifact]) -> None:
    (made["sum"].path / MANIFEST).write_bytes(b"{")
    with pytest.raises(CorruptError, match=r"inputs of .* cannot be determined"):
        sweep(store)
    assert verify_artifact(made["numbers"].path)


def test_a_draft_begins_when_the_garbage_is_gone(store: Store, made: dict[str, Artifact]) -> None:
    """Who takes up an artifact waits for gc: either it is seen to be needed, or it is missing at once."""
    finished = threading.Event()
    with steady(store.root, alone=True):
        thread = threading.Thread(target=lambda: (start_sum(store, made["numbers"]), finished.set()))
        thread.start()
        assert not finished.wait(0.5)
        assert not list(store.root.glob("add/.*.partial/journal.jsonl"))
    assert finished.wait(30)
    thread.join()
