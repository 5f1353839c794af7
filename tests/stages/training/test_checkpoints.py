"""Saves in a thread: the promises of those that a training waits for, at a small share of its time."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from sweep import in_child, limit_file_size
from torch import Tensor

from pipeline import durable
from pipeline.errors import CannotWrite, NumericError
from stages.training import checkpoints
from stages.training.checkpoints import Saver, pause_after
from tests.stages.training.small_task import draft_in, tiny, train_in, weights_of


@pytest.fixture(autouse=True)
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the state is."""
    monkeypatch.setattr(checkpoints, "SMALL", 0)


def state(value: float = 1.0) -> dict[str, Tensor]:
    return {"model.main.weight": torch.full((1000,), value)}


def newest(folder: Path) -> str:
    path = checkpoints.newest_checkpoint(draft_in(folder))
    return path.name if path else ""


def test_the_pause_grows_with_the_duration() -> None:
    """At 9.4 s per GB, XXL's 18 GB take 170 s: each 30 s they would take 85 % of the time, so less than 5 %."""
    assert [pause_after(duration, 30.0) for duration in (0.0, 1.0, 1.5, 2.0, 170.0)] == [30, 30, 30, 40, 3400]
    assert pause_after(170.0, 0.0) == 0, "every step is saved where that is asked for"
    for duration in (1.6, 10.0, 170.0):
        assert duration / (duration + pause_after(duration, 30.0)) < 0.05


def test_a_save_in_a_thread_holds_the_state_as_it_was(tmp_path: Path) -> None:
    own, is_free = state(), threading.Event()
    durable.watch = lambda what, path: is_free.wait(10) if what == "rename" else None
    try:
        with Saver(draft_in(tmp_path)) as saves:
            saves.save(7, own, best_step=0, waits=False)
            own["model.main.weight"].zero_()
            assert not saves.is_due(1e-9), "one at a time"
            assert saves.last == "none yet"
            saves.check()
            is_free.set()
            saves.wait()
            assert saves.last == "step 7"
    finally:
        durable.watch = None
    path = checkpoints.newest_checkpoint(draft_in(tmp_path))
    assert path is not None
    assert float(checkpoints.read_state(path)["model.main.weight"].mean()) == 1


@pytest.mark.parametrize(("waits", "free"), [(True, 10**15), (False, 0)])
def test_no_thread_where_somebody_waits_or_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool, free: int
) -> None:
    monkeypatch.setattr(checkpoints, "free_bytes", lambda device: free)
    monkeypatch.setattr(threading, "Thread", lambda *args, **kwargs: pytest.fail("a thread"))
    Saver(draft_in(tmp_path)).save(3, state(), best_step=0, waits=waits)
    assert newest(tmp_path) == "checkpoint-00000003.safetensors"


def test_what_the_thread_cannot_write_is_raised_at_the_next_step(tmp_path: Path) -> None:
    saves = Saver(draft_in(tmp_path))
    (tmp_path / "scratch").write_text("in the way")
    saves.save(1, state(), best_step=0, waits=False)
    assert saves._thread is not None
    saves._thread.join()
    with pytest.raises(CannotWrite):
        saves.check()
    saves.check()
    saves.save(2, state(float("nan")), best_step=0, waits=False)
    with pytest.raises(NumericError, match="is not saved"):
        saves.wait()


@pytest.mark.parametrize("kind", [{}, {"ema": 0.9}, {"evaluate_every": 3, "select": "best"}])
def test_resumed_equals_undisturbed(tmp_path: Path, kind: dict[str, object]) -> None:
    """A process that is killed in the middle of a write by the thread, again and again."""
    config, killed = tiny(**kind), tmp_path / "killed"
    whole = weights_of(train_in(tmp_path / "whole", config, checkpoint_seconds=1e9))
    for call in (6, 11, 14, 17):

        def kill_at(call: int = call) -> None:
            left = iter(range(call - 1))
            durable.watch = lambda what, path: os._exit(9) if next(left, None) is None else None

        assert in_child(lambda: train_in(killed, config), before=kill_at) == 9
    resumed = train_in(killed, config)
    assert weights_of(resumed) == whole
    assert len(resumed.task.seen) < config.steps, "it began anew instead of continuing"


@pytest.mark.parametrize("limit", [300, 900, 1500])
def test_a_full_disk_is_73_and_the_training_continues(tmp_path: Path, limit: int) -> None:
    whole = weights_of(train_in(tmp_path / "whole", tiny()))
    assert in_child(lambda: train_in(tmp_path / "full", tiny()), before=lambda: limit_file_size(limit)) == 73
    assert not list((tmp_path / "full").glob("scratch/*.partial")), "litter"
    assert weights_of(train_in(tmp_path / "full", tiny())) == whole


def test_a_signal_saves_the_step_in_which_it_came(tmp_path: Path) -> None:
    def poison(step: int) -> float:
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        train_in(tmp_path, tiny(), poison=poison)
    assert newest(tmp_path) == "checkpoint-00000005.safetensors"
