"""Two processes of a launch: process 0 runs, the other follows; both are real processes, without torch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_stages
from pydantic import Field

from pipeline import following, ranks
from pipeline import launch as launching
from pipeline.artifact import open_artifact
from pipeline.config import Config
from pipeline.draft import Draft
from pipeline.errors import NumericError, SmaltiError, StorageError, WorkerError
from pipeline.following import follow
from pipeline.launch import Followers, Link
from pipeline.recipe import load_recipe
from pipeline.runner import Options, run
from pipeline.runtime import Runtime, Terminated
from pipeline.stage import Inputs, read, stage
from pipeline.store import Store
from tests.two_processes import free_port, run_two, told

ROOT = Path(__file__).parent.parent.parent
RECIPE = """
title: numbers and what is learned from them
steps:
  numbers: {stage: count}
  learned: {stage: learn, inputs: {numbers: numbers}}
"""

Learn = Callable[[], None]
learn_more: Learn = lambda: None  # noqa: E731 - what a test makes of a training


class LearnConfig(Config):
    seed: int = Field(0, description="any number")


@stage(
    "learn",
    version=1,
    config=LearnConfig,
    reads={"numbers": read("numbers")},
    writes="learned",
    trains=True,
    example="",
)
def learn(config: LearnConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Every process notes what it reads, beside the store."""
    note = {"digest": inputs["numbers"].digest, "out": str(out.path), "threads": run.threads}
    with (inputs["numbers"].path.parents[2] / f"noted-{ranks.rank()}").open("a") as file:
        file.write(json.dumps(note) + "\n")
    learn_more()
    out.put("learned", {"learned.txt": inputs["numbers"].digest.encode()})


STAGES = {**tiny_stages.STAGES, "learn": learn}


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "ARRIVAL_SECONDS", 20.0)
    monkeypatch.setattr(launching, "LEAVE_SECONDS", 0.5)
    monkeypatch.setattr(following, "LEAVE_SECONDS", 0.5)
    monkeypatch.setattr(following, "KNOCK_SECONDS", 0.05)


def explain(error: Exception) -> SmaltiError:
    return error if isinstance(error, SmaltiError) else WorkerError(f"{type(error).__name__}: {error}")


def say_into(path: Path) -> Callable[[SmaltiError], None]:
    return lambda error: path.write_text(str(error)) and None


def lead(folder: Path, text: str = RECIPE, **options: Any) -> dict[str, Any]:
    """Process 0: run the recipe; the digests of what it made, or the error and its exit code."""
    others = Followers.listen(say_into(folder / "said-0"))
    try:
        recipe = load_recipe(tiny_stages.recipe_file(folder, text), STAGES, settings=[])
        chosen = Options(followers=others, threads=3, **options)
        done = {step.name: made.artifact.digest for step, made in run(recipe, Store(folder / "store"), chosen)}
        return {"code": 0, "made": done}
    except SmaltiError as error:
        return {"code": error.exit_code, "said": str(error)}
    finally:
        others.dismiss(patience=launching.ARRIVAL_SECONDS)


def take_part(folder: Path) -> dict[str, Any]:
    """The other process."""
    try:
        return {"code": follow(STAGES, explain=explain, say=say_into(folder / "said-1"))}
    except SmaltiError as error:
        return {"code": error.exit_code, "said": str(error)}


def launch(
    folder: Path, text: str = RECIPE, *, before: Callable[[int], None] = lambda rank: None, **options: Any
) -> list[dict[str, Any]]:
    """The reports of both; `before` is called in each with its rank."""

    def work(own: Path, rank: int) -> dict[str, Any]:
        before(rank)
        return take_part(folder) if rank else lead(folder, text, **options)

    return run_two(folder, work)


def noted(folder: Path, rank: int) -> list[dict[str, Any]]:
    path = folder / f"noted-{rank}"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def learning(what: Callable[[int], None]) -> Callable[[int], None]:
    """For `before`: let the training of each process do this."""

    def put(rank: int) -> None:
        global learn_more
        learn_more = lambda: what(rank)  # noqa: E731

    return put


def test_both_train_with_the_inputs_of_process_0(tmp_path: Path) -> None:
    first, second = launch(tmp_path)
    assert (first["code"], second) == (0, {"code": 0})
    (one,), (other,) = noted(tmp_path, 0), noted(tmp_path, 1)
    assert one["digest"] == other["digest"] == first["made"]["numbers"]
    assert one["threads"] == other["threads"] == 3
    assert not Path(other["out"]).is_relative_to(tmp_path), "a follower wrote into the store"
    assert launch(tmp_path)[1] == {"code": 0}
    assert len(noted(tmp_path, 1)) == 1, "it took part in what was done already"


def test_forced_steps_are_made_once_and_read_by_both(tmp_path: Path) -> None:
    launch(tmp_path)
    before = open_artifact(next((tmp_path / "store/count").iterdir())).path.stat().st_ino
    first, second = launch(tmp_path, force=True)
    assert [first["code"], second["code"]] == [0, 0]
    assert open_artifact(next((tmp_path / "store/count").iterdir())).path.stat().st_ino != before
    assert [len(noted(tmp_path, rank)) for rank in range(2)] == [2, 2]
    assert noted(tmp_path, 0)[1]["digest"] == noted(tmp_path, 1)[1]["digest"]


@pytest.mark.parametrize("launches", range(2))
def test_after_an_interrupted_commit_both_leave(tmp_path: Path, launches: int) -> None:
    """The draft is whole and only its renaming is missing: process 0 finishes it, and nobody trains or waits."""
    launch(tmp_path)
    (done,) = (tmp_path / "store/learn").iterdir()
    done.rename(done.with_name(f".{done.name}.partial"))
    first, second = launch(tmp_path)
    assert (first["code"], second) == (0, {"code": 0})
    assert [path.name for path in (tmp_path / "store/learn").iterdir()] == [done.name]
    assert [len(noted(tmp_path, rank)) for rank in range(2)] == [1, 1]


def test_an_input_that_differs_stops_both_before_the_first_step(tmp_path: Path) -> None:
    """Process 1 finds another artifact in the place of the input, as on a machine with a store of its own."""
    other = tmp_path / "other"
    launch(other, RECIPE.replace("{stage: count}", "{stage: count, config: {seed: 5}}"))
    (elsewhere,) = (other / "store/count").iterdir()

    def look_elsewhere(rank: int) -> None:
        if rank:
            following.open_input = lambda path: open_artifact(elsewhere)

    first, second = launch(tmp_path, before=look_elsewhere)
    assert (first["code"], second) == (4, {"code": 0})
    assert first["said"].startswith("process 1 (")
    assert "the input numbers at" in first["said"]
    assert "is not the one that process 0 reads" in first["said"]
    assert noted(tmp_path, 0) == noted(tmp_path, 1) == []


def test_a_process_that_does_not_see_the_store_says_so(tmp_path: Path) -> None:
    check = following.check_store

    def look_elsewhere(rank: int) -> None:
        if rank:
            following.check_store = lambda order: check({**order, "nonce": order["nonce"].replace("store", "nowhere")})

    first, second = launch(tmp_path, before=look_elsewhere)
    assert (first["code"], second) == (74, {"code": 0})
    assert f"cannot see the store at {tmp_path / 'store'}" in first["said"]
    assert noted(tmp_path, 0) == noted(tmp_path, 1) == []


def test_a_proof_leaves_no_trace(tmp_path: Path) -> None:
    launch(tmp_path)
    assert not list((tmp_path / "store/learn").rglob(".nonce*"))


def test_an_error_in_another_process_is_what_process_0_says(tmp_path: Path) -> None:
    def break_exchange(rank: int) -> None:
        if rank:
            raise NumericError("step 7 has loss nan", hint="lower the rate")
        raise RuntimeError("connection closed by peer")

    first, second = launch(tmp_path, before=learning(break_exchange))
    assert first["code"] == 5
    assert first["said"].startswith("process 1 (")
    assert first["said"].endswith("step 7 has loss nan; lower the rate")
    assert second["code"] in (0, 5)
    assert "said" not in second


def test_an_error_everywhere_is_said_once(tmp_path: Path) -> None:
    def fail(rank: int) -> None:
        raise NumericError("step 7 has loss nan")

    first, second = launch(tmp_path, before=learning(fail))
    assert first == {"code": 5, "said": "step 7 has loss nan"}
    assert "said" not in second


def test_an_error_in_process_0_lets_the_other_leave(tmp_path: Path) -> None:
    def fail(rank: int) -> None:
        if rank:
            time.sleep(0.3)
            raise RuntimeError("connection closed by peer")
        raise StorageError("the disk is gone")

    first, second = launch(tmp_path, before=learning(fail))
    assert first == {"code": 74, "said": "the disk is gone"}
    assert second == {"code": 0}


def test_a_stop_of_both_is_a_stop(tmp_path: Path) -> None:
    def stop(rank: int) -> None:
        raise Terminated

    def work(own: Path, rank: int) -> dict[str, Any]:
        learning(stop)(rank)
        if rank:
            return take_part(tmp_path)
        with pytest.raises(Terminated):
            lead(tmp_path)
        return {}

    assert run_two(tmp_path, work)[1] == {"code": 143}


def run_children(*works: Callable[[], Any]) -> list[int]:
    """Fork one process of a launch for each of these, in the order of ranks; their process ids."""
    port, children = free_port(), []
    for rank, work in enumerate(works):
        child = os.fork()
        if child == 0:
            try:
                os.environ.update(told(rank, port))
                work()
            finally:
                os._exit(99)
        children.append(child)
    return children


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_hanging_process_is_ended_when_the_other_fails(tmp_path: Path) -> None:
    """As in an exchange over NCCL, which waits for a lost process forever."""

    def hang(rank: int) -> None:
        if rank:
            raise NumericError("step 7 has loss nan")
        time.sleep(60)

    learning(hang)(0)
    first, second = run_children(lambda: lead(tmp_path), lambda: (learning(hang)(1), take_part(tmp_path)))
    assert exit_code(first) == 5
    assert exit_code(second) == 99
    assert (tmp_path / "said-0").read_text().endswith("step 7 has loss nan")


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGKILL, "was lost"), (signal.SIGSTOP, "has been silent for 1 s")]
)
def test_the_other_leaves_when_process_0_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, said: str
) -> None:
    """Whether it waits for an order or hangs in a training."""
    monkeypatch.setattr(launching, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(launching, "BEAT_SECONDS", 0.2)

    def hang(rank: int) -> None:
        (tmp_path / f"hangs-{rank}").touch()
        time.sleep(60)

    def wait() -> None:
        (tmp_path / "idle.json").write_text(json.dumps(take_part(tmp_path)))

    def lead_in_vain() -> None:
        others = Followers.listen(say_into(tmp_path / "said-0"))
        while len(others._present) < 1:
            time.sleep(0.02)
        (tmp_path / "idle").touch()
        time.sleep(60)

    learning(hang)(0)
    idle = run_children(lead_in_vain, wait)
    training = run_children(lambda: lead(tmp_path), lambda: (learning(hang)(1), take_part(tmp_path)))
    try:
        for name in ("idle", "hangs-0", "hangs-1"):
            wait_until((tmp_path / name).exists)
        for first in (idle[0], training[0]):
            os.kill(first, number)
        assert exit_code(idle[1]) == 99
        assert exit_code(training[1]) == 74
    finally:
        for first in (idle[0], training[0]):
            os.kill(first, signal.SIGKILL)
            os.waitpid(first, 0)
    report = json.loads((tmp_path / "idle.json").read_text())
    assert report["code"] == 74
    assert f"process 0 at 127.0.0.1 {said}" in report["said"]
    assert said in (tmp_path / "said-1").read_text()


def test_a_process_that_never_comes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "ARRIVAL_SECONDS", 0.5)
    report = tmp_path / "report"
    (child,) = run_children(lambda: report.write_text(json.dumps(lead(tmp_path))))
    exit_code(child)
    said = json.loads(report.read_text())
    assert said["code"] == 74
    assert "of 2 processes number 1 did not reach process 0" in said["said"]


def test_without_process_0_the_other_says_where_it_looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launching, "ARRIVAL_SECONDS", 0.3)
    for name, value in told(1, free_port()).items():
        monkeypatch.setenv(name, value)
    report = take_part(tmp_path)
    assert report["code"] == 74
    assert "process 1 (" in report["said"]
    assert "did not reach process 0 at 127.0.0.1" in report["said"]


def test_whoever_does_not_know_the_key_is_not_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in told(0, free_port()).items():
        monkeypatch.setenv(name, value)
    others = Followers.listen(say_into(tmp_path / "said"))
    meeting = ranks.meeting()
    address = meeting.host, meeting.ports[0]
    with pytest.raises(OSError, match="not a process of this launch"):
        Link(socket.create_connection(address), b"guessed", is_first=False)
    assert not others._present
    Link(socket.create_connection(address), meeting.key, is_first=False).send({"rank": 1, "host": "here"})
    wait_until(lambda: 1 in others._present)


def test_a_launch_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(SmaltiError, match="WORLD_SIZE=2 but not MASTER_ADDR and MASTER_PORT"):
        Followers.listen(lambda error: None)


def run_scripts(folder: Path, *command: str) -> list[subprocess.CompletedProcess[str]]:
    """One script of tests/faults in two processes of a launch."""
    port, paths = free_port(), os.pathsep.join([str(ROOT), str(ROOT / "tests/faults")])
    script = [sys.executable, str(ROOT / "tests/faults" / command[0]), *command[1:]]
    processes = [
        subprocess.Popen(
            script,
            env={**os.environ, "PYTHONPATH": paths, **told(rank, port)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [process.communicate(timeout=60) for process in processes]
    return [
        subprocess.CompletedProcess(script, process.returncode, *said)
        for process, said in zip(processes, ended, strict=True)
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_all_processes_work_on_one_cluster(tmp_path: Path, workers: int) -> None:
    """Process 0 in a thread, or a local worker in its place; the other one always. The bytes are those of one process."""
    ended = run_scripts(tmp_path, "tiny_launch.py", str(tmp_path), str(workers))
    assert [process.returncode for process in ended] == [0, 0], [process.stderr for process in ended]
    first, second = (json.loads(process.stdout) for process in ended)
    assert len(first["processes"]) == 2
    assert second["process"] in first["processes"]
    assert (first["process"] in first["processes"]) is not bool(workers)
    assert [first["schedulers"], second["schedulers"]] == [1, 0]
    alone = tiny_stages.run_all(tiny_stages.load(tmp_path), tmp_path / "alone")
    assert alone["numbers"].digest == first["digest"]


def test_the_command_prints_in_process_0_alone(tmp_path: Path) -> None:
    tiny_stages.recipe_file(tmp_path)
    command = ["tiny_command.py", "run", "recipes/tiny.yaml", "--path", "weights=recipes/tiny.yaml"]
    first, second = run_scripts(tmp_path, *command, "--workers", "1", "--json")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert len(json.loads(first.stdout)["steps"]) == 2
    assert (second.stdout, second.stderr) == ("", "")
    first, second = run_scripts(tmp_path, *command, "--set", "numbers.rows=0")
    assert (first.returncode, second.returncode) == (2, 0)
    assert first.stderr.startswith("error: ")
    assert (second.stdout, second.stderr) == ("", "")
