"""Cores: what belongs to a piece of work beside others on the same machine."""

from __future__ import annotations

import pytest

from pipeline import cores


def test_cores_are_shared_with_tasks_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(cores, "core_count", lambda: 8)
    assert cores.own_cores() == 8
    assert [cores.work_beside(tasks, lambda number: cores.own_cores(), 0) for tasks in (1, 2, 3, 8, 20)] == [
        8,
        4,
        2,
        1,
        1,
    ]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores.own_cores() == 2
    assert cores.work_beside(4, lambda number: cores.own_cores(), 0) == 2
    with pytest.raises(ZeroDivisionError):
        cores.work_beside(8, lambda number: number // 0, 1)
    assert cores.own_cores() == 2
