"""Cores: what belongs to a piece of work beside others on the same machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def test_a_training_leaves_a_core_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many threads as cores, one other busy process made it slower than one thread is."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    found = []
    for count in (1, 2, 3, 16):
        monkeypatch.setattr(cores, "core_count", lambda count=count: count)
        found.append(cores.usual_threads())
    assert found == [1, 1, 2, 15]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores.usual_threads() == 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_idle_threads_of_the_command_free_their_core() -> None:
    """OpenMP reads the policy when it is loaded, so nothing may load it before the command has begun."""
    code = """
import os, sys
from cli.main import main
sys.argv = ["smalti", "--version"]
try:
    main()
except SystemExit:
    print(os.environ["OMP_WAIT_POLICY"], "libgomp" in open("/proc/self/maps").read())
"""
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "passive False"
