"""The store: names, refs, garbage, locks; one artifact whoever makes it, and a reader never sees a half."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sweep import in_child, without_fsync
from tiny_stages import load, run_all

from pipeline.artifact import MANIFEST, Artifact, verify_artifact
from pipeline.draft import Request
from pipeline.errors import Busy, CorruptError, InputError, UsageError
from pipeline.garbage import Survey, survey, sweep
from pipeline.locks import lock
from pipeline.store import Store

FORK = multiprocessing.get_context("fork")


def request(number: int = 0) -> Request:
    return Request("make", "things", 1, f"{number:x}".rjust(64, "a"), {"number": number}, {}, {})


def make(store: Store, number: int = 0, **options: Any) -> bool:
    """Make a tiny artifact; False if it was there."""
    with store.draft(request(number), **options) as draft:
        if draft is None:
            return False
        for unit in range(3):
            draft.put(f"unit-{unit}", {f"{unit}.bin": bytes([number + unit]) * 100})
        draft.commit(store.path("make", request(number).key))
    return True


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Artifact]]:
    folder = tmp_path_factory.mktemp("tiny")
    return Store(folder / "store"), run_all(load(folder), folder / "store")


def test_nothing_is_created_before_the_first_write(store: Store) -> None:
    assert (store.artifacts(), store.drafts(), store.refs(), survey(store)) == ([], [], {}, Survey())
    assert sweep(store) == []
    assert not store.root.exists()


def test_an_artifact_is_found_by_ref_key_beginning_and_path(
    tiny: tuple[Store, dict[str, Artifact]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, made = tiny
    want = made["numbers"].path
    key = want.name
    monkeypatch.chdir(want.parent)
    for name in ("tiny/numbers", key, key[:8], f"count/{key[:8]}", f"count/{key}", str(want), f"./{key}"):
        assert store.find(name).digest == made["numbers"].digest
    for name in ("tiny/nothing", "z" * 64, "", "/", "count/", f"add/{key[:8]}", "../count", "tiny"):
        with pytest.raises(InputError, match="names no artifact"):
            store.find(name)


def test_a_beginning_of_two_keys_is_refused(store: Store) -> None:
    make(store, 1)
    make(store, 2)
    with pytest.raises(InputError, match="is the beginning of 2 keys"):
        store.find("aaa")


@pytest.mark.parametrize("name", ["", "..", "../x", "/x", "a//b", "a/./b", "a/../b", "a/"])
def test_names_that_leave_the_refs_are_refused(store: Store, name: str) -> None:
    make(store)
    with pytest.raises(UsageError, match="is not a valid ref name"):
        store.set_ref(name, store.open("make", request().key))


@pytest.mark.parametrize("text", ["", "nonsense", "make/short", "../../" + "a" * 64, "/" + "a" * 64])
def test_a_damaged_ref_is_refused(store: Store, text: str) -> None:
    make(store)
    store.set_ref("x/y", store.open("make", request().key))
    (store.root / "refs/x/y").write_text(text)
    with pytest.raises(CorruptError):
        store.find("x/y")
    with pytest.raises(CorruptError):
        survey(store)


def test_a_ref_moves_and_one_that_fits_is_not_written_again(store: Store) -> None:
    for number in (1, 2):
        make(store, number)
        store.set_ref("x", store.open("make", request(number).key))
        assert store.read_ref("x") == ("make", request(number).key)
    inode = (store.root / "refs/x").stat().st_ino
    store.set_ref("x", store.open("make", request(2).key))
    assert (store.root / "refs/x").stat().st_ino == inode


def test_another_artifact_in_its_place_is_refused(store: Store) -> None:
    for number in (1, 2):
        make(store, number)
    one, two = (store.path("make", request(number).key) for number in (1, 2))
    one.rename(store.root / "x")
    two.rename(one)
    with pytest.raises(CorruptError, match="was moved here"):
        store.open("make", request(1).key)


# Locks.


def test_one_of_two_makes_it_and_the_other_waits(tmp_path: Path) -> None:
    """Row 3: twenty rounds behind a barrier; one artifact each time, made once."""
    with without_fsync():
        for round_ in range(20):
            store, results = Store(tmp_path / str(round_)), FORK.SimpleQueue()
            barrier = FORK.Barrier(2)
            workers = [FORK.Process(target=behind, args=(barrier, results, store)) for _ in range(2)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(30)
            assert [worker.exitcode for worker in workers] == [0, 0]
            assert sorted([results.get(), results.get()]) == [False, True], f"round {round_}"
            assert [path.name for path in (store.root / "make").iterdir()] == [request().key]


def behind(barrier: Any, results: Any, store: Store) -> None:
    barrier.wait()
    results.put(make(store))


def test_two_keys_at_once_do_not_meet(store: Store) -> None:
    barrier, results = FORK.Barrier(4), FORK.SimpleQueue()
    workers = [FORK.Process(target=behind_with, args=(barrier, results, store, number)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [results.get() for _ in workers] == [True] * 4
    assert {verify_artifact(path).config["number"] for path in store.artifacts()} == {0, 1, 2, 3}


def behind_with(barrier: Any, results: Any, store: Store, number: int) -> None:
    barrier.wait()
    results.put(make(store, number))


def test_without_waiting_a_held_lock_is_75(store: Store) -> None:
    with store.draft(request()):
        assert in_child(lambda: make(store, wait=False)) == 75
        assert in_child(lambda: make(store, 1, wait=False)) == 0
    with (
        lock(store.root / "make" / "x.lock", wait=True),
        pytest.raises(Busy),
        lock(store.root / "make" / "x.lock", wait=False),
    ):
        pass


def make_and_die(store: Store) -> None:
    with store.draft(request()) as draft:
        assert draft is not None
        draft.put("unit", {"x": b"1"})
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_holder_frees_its_lock_and_its_units_are_kept(store: Store) -> None:
    assert in_child(lambda: make_and_die(store)) == -signal.SIGKILL
    with store.draft(request(), wait=False) as draft:
        assert draft is not None
        assert draft.units() == ["unit"]


def test_a_forked_process_does_not_keep_the_lock_of_its_parent(store: Store) -> None:
    path = store.root / "make" / "x.lock"
    with lock(path, wait=True):
        child = FORK.Process(target=time.sleep, args=(30,))
        child.start()
    with lock(path, wait=False):
        child.kill()
        child.join()


def test_the_lock_is_gone_after_use_also_after_an_error(store: Store) -> None:
    with suppress(ValueError), store.draft(request()):
        raise ValueError
    assert not list(store.root.rglob("*.lock"))


def test_a_reader_never_sees_a_half(store: Store) -> None:
    """Row 4: while one process makes the artifact again and again, another one opens whole ones only."""

    def write() -> None:
        with without_fsync():
            for _ in range(30):
                make(store, again=True)

    make(store)
    writer = FORK.Process(target=write)
    writer.start()
    seen = 0
    while writer.is_alive():
        path = store.path("make", request().key)
        with suppress(FileNotFoundError, CorruptError):
            before = (path / MANIFEST).stat().st_ino
            whole = verify_or_none(path)
            if (path / MANIFEST).stat().st_ino == before:  # not swapped while we looked
                assert whole is not None
                seen += 1
    assert writer.exitcode == 0
    assert seen
    assert not list(store.root.rglob("*.replaced"))


def verify_or_none(path: Path) -> Artifact | None:
    try:
        return verify_artifact(path)
    except CorruptError:
        return None


@pytest.mark.parametrize("again", [False, True])
def test_a_damaged_artifact_is_made_anew_and_kept(store: Store, again: bool) -> None:
    make(store)
    path = store.path("make", request().key)
    (path / "0.bin").write_bytes(b"damaged")
    assert make(store, again=again)
    assert verify_artifact(path)
    assert (path.with_name(f".{path.name}.damaged-1") / "0.bin").read_bytes() == b"damaged"


def test_waiting_for_the_one_who_makes_it_again_is_enough(store: Store) -> None:
    make(store)
    barrier, results = FORK.Barrier(2), FORK.SimpleQueue()

    def wait_for_it() -> None:
        barrier.wait()
        results.put(make(store, again=True))

    with store.draft(request(), again=True) as draft:
        assert draft is not None
        waiter = FORK.Process(target=wait_for_it)
        waiter.start()
        barrier.wait()
        time.sleep(0.3)  # it stands at the lock now
        draft.put("unit", {"0.bin": b"new"})
        draft.commit(store.path("make", request().key))
    waiter.join(30)
    assert results.get() is False
