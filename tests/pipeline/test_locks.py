"""Locks say who holds them; who waits says for whom."""

from __future__ import annotations

import multiprocessing
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import locks
from pipeline.errors import Busy
from pipeline.locks import Holder, find_holder, lock, steady

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "count" / ("c0ffee" * 10 + ".lock")


def hold(path: Path, ready: Any, done: Any) -> None:
    with lock(path, wait=True):
        ready.set()
        done.wait(30)


def test_a_wait_is_told_in_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which key, held by whom, since when; and only if it takes longer than a moment."""
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    ready, done, said = FORK.Event(), FORK.Event(), []
    holder = FORK.Process(target=hold, args=(path, ready, done))
    holder.start()
    assert ready.wait(30)
    found = find_holder(path)
    assert found is not None
    assert (found.host, found.pid) == (platform.node(), holder.pid)
    assert found.since[:10] == time.strftime("%Y-%m-%d")
    threading.Timer(0.8, done.set).start()
    with lock(path, wait=True, say=said.append):
        assert said == [
            f"  waiting for c0ffeec0ffee (count), which is being made by process {holder.pid} on {platform.node()} "
            f"since {found.since}"
        ]
    holder.join()
    with lock(path, wait=True, say=said.append):
        assert len(said) == 1
    assert find_holder(path) is None


def test_who_does_not_wait_is_told_who_holds_it(path: Path) -> None:
    with (
        lock(path, wait=True),
        pytest.raises(Busy, match=f"process {os.getpid()} on {platform.node()}"),
        lock(path, wait=False),
    ):
        pass


def test_looking_does_not_take_it_and_a_note_may_be_missing(path: Path) -> None:
    assert find_holder(path) is None
    path.parent.mkdir()
    path.touch()
    assert find_holder(path) is None
    with lock(path, wait=False):
        path.write_bytes(b"")
        assert find_holder(path) == Holder("", 0, "")
        assert "a process that did not say which" in str(find_holder(path))


def test_a_store_holds_still_for_many_or_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    entered, said = threading.Event(), []

    def remove() -> None:
        with steady(tmp_path, alone=True, say=said.append):
            entered.set()

    with steady(tmp_path), steady(tmp_path):
        thread = threading.Thread(target=remove)
        thread.start()
        assert not entered.wait(0.5)
    assert entered.wait(10)
    thread.join()
    assert said == [f"  waiting for {tmp_path}: other processes open artifacts"]
    with steady(tmp_path / "nothing", alone=True):
        pass
