"""log/run.json: one entry per attempt, interrupted ones included; nothing of it in manifest or digest."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from tiny_stages import load, run_all

from pipeline.runlog import Attempt, git_revision, read_attempts, total_seconds, versions
from pipeline.runner import Options


def attempt(path: Path) -> Attempt:
    return Attempt(path, device="cpu", threads=1, command="smalti run x")


def outcomes(path: Path) -> list[object]:
    return [entry["outcome"] for entry in read_attempts(path)]


def test_every_attempt_has_an_entry(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with suppress(ZeroDivisionError), attempt(path):
        raise ZeroDivisionError
    with suppress(KeyboardInterrupt), attempt(path):
        raise KeyboardInterrupt
    with attempt(path):
        assert outcomes(path) == ["ZeroDivisionError", "KeyboardInterrupt", "interrupted"]  # as a kill would leave it
    assert outcomes(path) == ["ZeroDivisionError", "KeyboardInterrupt", "done"]
    assert total_seconds(tmp_path) >= 0.0


def test_an_entry_tells_what_may_explain_a_difference(tmp_path: Path) -> None:
    with attempt(tmp_path / "run.json"):
        pass
    (entry,) = read_attempts(tmp_path / "run.json")
    assert {
        "host",
        "started",
        "seconds",
        "versions",
        "device",
        "threads",
        "world_size",
        "git",
        "command",
        "outcome",
    } <= set(entry)
    assert entry["versions"] == versions()
    assert {"torch", "numpy", "zarr"} <= set(versions())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"attempts": 3}', '{"attempts": [3]}', "\0", '{"attempts": [{}'])
def test_a_damaged_log_is_no_fault_of_the_artifact(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    assert total_seconds(tmp_path) == 0.0
    with attempt(tmp_path / "run.json"):
        pass
    assert outcomes(tmp_path / "run.json") == ["done"]


def test_the_log_is_kept_on_resume(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    recipe = load(tmp_path, "numbers.fault=input", f"numbers.mark={mark}")
    for _ in range(2):
        with suppress(Exception):
            run_all(recipe, tmp_path / "store")
    (log,) = (tmp_path / "store").glob("count/.*.partial/log/run.json")
    assert outcomes(log) == ["InputError", "InputError"]


def test_the_command_is_in_the_log_alone(tmp_path: Path) -> None:
    path = run_all(load(tmp_path), tmp_path / "store", Options(command="smalti secret"))["sum"].path
    assert [entry["command"] for entry in read_attempts(path / "log" / "run.json")] == ["smalti secret"]
    assert "secret" not in (path / "manifest.json").read_text()
    assert json.loads((path / "log" / "run.json").read_text())


def test_the_revision_is_a_hash_or_unknown() -> None:
    revision = git_revision()
    assert revision is None or len(revision) == 40
