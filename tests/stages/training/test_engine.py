"""The engine: exact resume, bad numbers, averages, parts of a batch, two optimizers, signals, several processes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sweep import in_child, limit_file_size

from pipeline import durable
from pipeline.errors import CorruptError, MemoryExhausted, NumericError, UsageError
from pipeline.progress import Progress
from pipeline.runtime import Terminated
from stages.training import checkpoints
from stages.training.config import AdamW, Constant
from stages.training.draws import rows_of_steps
from tests.stages.training import small_task
from tests.stages.training.small_task import Network, SmallTask, draft_in, first_gradients, tiny, train_in, weights_of
from tests.two_processes import die, run_two

KINDS = {
    "plain": {},
    "averaged": {"ema": 0.9},
    "in passes": {"rows_per_pass": 4},
    "best": {"evaluate_every": 3, "select": "best"},
    "half": {"precision": "bfloat16"},
}


class Killed(BaseException):
    """Stands for a process that dies: nothing catches it."""


@contextmanager
def killed_at(call: int) -> Iterator[None]:
    left = iter(range(call - 1))

    def watch(what: str, path: Path) -> None:
        if next(left, None) is None:
            raise Killed

    durable.watch = watch
    try:
        yield
    finally:
        durable.watch = None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [{"parts": 1}, {"parts": 2}, {"parts": 2, "critic_first": True}])
def test_resumed_equals_undisturbed(tmp_path: Path, kind: str, parts: dict[str, Any]) -> None:
    config = tiny(**KINDS[kind])
    whole = train_in(tmp_path / "whole", config, **parts, checkpoint_seconds=1e9)
    folder, kills = tmp_path / "killed", 0
    for call in (9, 14, 17, 20):
        with killed_at(call), pytest.raises(Killed):
            train_in(folder, config, **parts)
        kills += 1
    resumed = train_in(folder, config, **parts)
    assert kills == 4
    assert weights_of(resumed) == weights_of(whole)
    assert (resumed.loss, resumed.figures) == (whole.loss, whole.figures)
    assert len(resumed.task.seen) < config.steps, "it began anew instead of continuing"


def test_every_moment_of_a_checkpoint(tmp_path: Path) -> None:
    config = tiny(steps=3, evaluate_every=1, select="best")
    whole = weights_of(train_in(tmp_path / "whole", config))
    calls: list[str] = []
    durable.watch = lambda what, path: calls.append(what)
    try:
        train_in(tmp_path / "counted", config)
    finally:
        durable.watch = None
    for call in range(1, len(calls) + 1):
        with killed_at(call), pytest.raises(Killed):
            train_in(tmp_path / str(call), config)
        assert weights_of(train_in(tmp_path / str(call), config)) == whole, f"killed at call {call}"


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    first = train_in(tmp_path, tiny())
    again = train_in(tmp_path, tiny())
    assert again.task.seen == []
    assert weights_of(again) == weights_of(first)
    assert (again.loss, again.figures) == (first.loss, first.figures)


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    train_in(tmp_path, tiny())
    assert [path.name for path in sorted((tmp_path / "scratch").iterdir())] == [
        "checkpoint-00000011.safetensors",
        "checkpoint-00000012.safetensors",
    ]


def test_training_learns(tmp_path: Path) -> None:
    outcome = train_in(tmp_path, tiny(steps=150), dropout=0.0, checkpoint_seconds=1e9)
    assert outcome.figures["loss"] < 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_loss_stops_at_once(tmp_path: Path, value: float) -> None:
    def poison(step: int) -> float:
        return value if step == 5 else 1.0

    with pytest.raises(NumericError, match=r"step 5 of main .*last good checkpoint is step 5.*skip_bad_steps"):
        train_in(tmp_path, tiny(), poison=poison)
    newest = checkpoints.newest_checkpoint(draft_in(tmp_path))
    assert newest is not None
    assert newest.name == "checkpoint-00000005.safetensors"
    assert all(torch.isfinite(tensor).all() for name, tensor in load_file(newest).items() if "engine" not in name)


def test_a_bad_gradient_stops_at_once(tmp_path: Path) -> None:
    class Slope(SmallTask):
        def losses(self, part, modules, batch, step):  # type: ignore[no-untyped-def]
            found = super().losses(part, modules, batch, step)
            zero = (self.network.linear.weight * 0).abs().sum()
            return found._replace(losses={**found.losses, "root": zero.sqrt()})  # value 0, slope inf * 0

    from stages.training.engine import train
    from tests.stages.training.small_task import runtime_in

    with pytest.raises(NumericError, match=r"gradient norm nan"):
        train(
            lambda device: Slope(dropout=0.0, parts=1, poison=lambda step: 1.0),
            tiny(),
            draft_in(tmp_path),
            runtime_in(tmp_path),
            label="slope",
        )


def test_some_bad_steps_may_be_skipped(tmp_path: Path) -> None:
    def poison(step: int) -> float:
        return float("nan") if step in (4, 7) else 1.0

    with pytest.raises(NumericError, match="step 7"):
        train_in(tmp_path / "one", tiny(skip_bad_steps=1), poison=poison)
    outcome = train_in(tmp_path / "two", tiny(skip_bad_steps=2, ema=0.5), poison=poison)
    assert outcome.figures["loss"] < 100


def test_a_skipped_step_leaves_no_trace_in_buffers(tmp_path: Path) -> None:
    def poison(step: int) -> float:
        return float("nan") if step == 2 else 1.0

    before = train_in(tmp_path / "two", tiny(steps=2), poison=poison)
    after = train_in(tmp_path / "three", tiny(steps=3, skip_bad_steps=1), poison=poison)
    assert torch.equal(before.task.network.mean_I, after.task.network.mean_I)


@pytest.mark.parametrize("warms_up", [False, True])
def test_an_average_is_the_mean_of_the_past(tmp_path: Path, warms_up: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def weights_after(steps: int, ema: float | None) -> torch.Tensor:
        config = tiny(steps=steps, ema=ema, ema_warmup=warms_up)
        task = train_in(tmp_path / f"{steps} {ema}", config, checkpoint_seconds=1e9).task
        return task.network.linear.weight.detach().clone()

    monkeypatch.setattr(small_task, "SCHEDULE", Constant())  # steps alone differ
    monkeypatch.setattr(small_task, "OPTIMIZER", AdamW(learning_rate=0.05, weight_decay=0.1))
    torch.manual_seed(0)
    first, one, two = (weights_after(steps, None) for steps in (1, 2, 3))
    averaged = weights_after(3, 0.75)
    start = weights_after(1, 0.75)
    second, third = (1 - 2 / 11, 1 - 3 / 12) if warms_up else (0.25, 0.25)
    expected = start.lerp(one, second).lerp(two, third)
    assert torch.allclose(averaged, expected, atol=1e-6)
    assert not torch.allclose(start, first)


def test_the_best_weights_are_selected(tmp_path: Path) -> None:
    """With a rate that explodes after a while, the best weights are those of an early step."""
    best = train_in(tmp_path / "best", tiny(steps=60, evaluate_every=2, select="best"), checkpoint_seconds=1e9)
    last = train_in(tmp_path / "last", tiny(steps=60), checkpoint_seconds=1e9)
    lines = [json.loads(line) for line in (tmp_path / "best/log/metrics.jsonl").read_text().splitlines()]
    seen = [line["loss"] for line in lines if line["event"] == "evaluate"]
    assert best.figures["loss"] == min(seen)
    assert len(seen) == 30
    assert best.figures["loss"] <= last.figures["loss"]


def test_passes_make_one_batch(tmp_path: Path) -> None:
    one = train_in(tmp_path / "one", tiny(steps=1), dropout=0.0).task.network
    four = train_in(tmp_path / "four", tiny(steps=1, rows_per_pass=2), dropout=0.0).task.network
    assert torch.allclose(one.linear.weight, four.linear.weight, atol=1e-3)


@pytest.mark.parametrize("critic_first", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_parts_share_one_pass(tmp_path: Path, critic_first: bool, passes: int) -> None:
    """All parts see what the main part makes; a pass that comes twice, since two graphs would not fit, is the same."""
    config = tiny(steps=5, rows_per_pass=8 // passes)
    task = train_in(tmp_path, config, parts=2, critic_first=critic_first).task
    if not critic_first or passes == 1:
        assert len(task.passes) == 5 * passes
        assert all(has_gradient for _, has_gradient in task.passes)
        return
    assert len(task.passes) == 5 * 2 * passes
    for step in (task.passes[first : first + 4] for first in range(0, 20, 4)):
        assert [has_gradient for _, has_gradient in step] == [False, False, True, True]
        assert [value for value, _ in step[:2]] == [value for value, _ in step[2:]]
    alone = train_in(tmp_path / "alone", config, parts=2).task
    assert torch.equal(task.network.mean_I, alone.network.mean_I), "a pass was counted twice"


def test_another_trainings_checkpoint_is_refused_with_a_table(tmp_path: Path) -> None:
    train_in(tmp_path, tiny(steps=2))
    out = draft_in(tmp_path)
    newest = checkpoints.newest_checkpoint(out)
    assert newest is not None
    state = load_file(newest)
    state["model.main.linear.weight"] = torch.zeros(1, 9)
    del state["model.main.linear.bias"]
    save_file(state, tmp_path / "other.safetensors")
    with out.writing("checkpoint-00000099", "scratch/checkpoint-00000099.safetensors") as path:
        path.write_bytes((tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(
        CorruptError, match=r"(?s)missing +model\.main\.linear\.bias.*misshapen +model\.main\.linear\.weight +1x9 +1x6"
    ):
        train_in(tmp_path, tiny())


def test_a_damaged_checkpoint_is_not_used(tmp_path: Path) -> None:
    whole = weights_of(train_in(tmp_path / "whole", tiny()))
    with pytest.raises(NumericError):
        train_in(tmp_path / "cut", tiny(), poison=lambda step: float("nan") if step == 6 else 1.0)
    newest = checkpoints.newest_checkpoint(draft_in(tmp_path / "cut"))
    assert newest is not None
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    assert weights_of(train_in(tmp_path / "cut", tiny())) == whole


def test_too_large_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"batch is 64, but there are only 24 rows"):
        train_in(tmp_path, tiny(batch=64))


def test_exhausted_memory_becomes_a_sentence(tmp_path: Path) -> None:
    def poison(step: int) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MemoryExhausted, match=r"8 rows at a time.*training\.rows_per_pass to 4"):
        train_in(tmp_path, tiny(), poison=poison)


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated), (signal.SIGUSR1, Terminated)],
)
def test_a_signal_saves_and_leaves(tmp_path: Path, number: signal.Signals, error: type[BaseException]) -> None:
    def poison(step: int) -> float:
        if step == 4:
            os.kill(os.getpid(), number)
        return 1.0

    with pytest.raises(error):
        train_in(tmp_path / "left", tiny(), poison=poison, checkpoint_seconds=1e9)
    newest = checkpoints.newest_checkpoint(draft_in(tmp_path / "left"))
    assert newest is not None
    assert newest.name == "checkpoint-00000005.safetensors"
    assert weights_of(train_in(tmp_path / "left", tiny())) == weights_of(train_in(tmp_path / "whole", tiny()))


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    """The first one is answered in a line; the second one ends the step in which it comes."""

    def poison(step: int) -> float:
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            assert "press Ctrl-C again to leave at once" in said.getvalue()
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("it stayed")
        return 1.0

    said = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        train_in(tmp_path / "left", tiny(), poison=poison, progress=Progress(said))
    assert said.getvalue().count("Ctrl-C") == 1
    newest = checkpoints.newest_checkpoint(draft_in(tmp_path / "left"))
    assert newest is not None
    assert newest.name == "checkpoint-00000004.safetensors"
    assert weights_of(train_in(tmp_path / "left", tiny())) == weights_of(train_in(tmp_path / "whole", tiny()))


@pytest.mark.parametrize("limit", [0, 300, 1000, 1500, 2000, 3000])
def test_a_full_disk_is_73_and_the_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Whatever does not fit, a checkpoint, the best weights, the journal, metrics or TensorBoard's file: no litter, nothing lost."""
    monkeypatch.setattr("stages.training.metrics.TENSORBOARD_STEPS", 12)
    config, full = tiny(evaluate_every=3, select="best"), tmp_path / "full"
    whole = weights_of(train_in(tmp_path / "whole", config))
    assert in_child(lambda: train_in(full, config), before=lambda: limit_file_size(limit)) == 73
    written = [path.name for path in (full / "scratch").glob("*")] if (full / "scratch").exists() else []
    assert all(re.fullmatch(r"(checkpoint|best)-\d{8}\.safetensors", name) for name in written), "litter"
    assert weights_of(train_in(full, config)) == whole
    assert steps_in(full) == list(range(1, 13))


def test_metrics_have_every_loss_and_rate(tmp_path: Path) -> None:
    train_in(tmp_path, tiny(), parts=2)
    lines = [json.loads(line) for line in (tmp_path / "log/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert {"loss", "error", "judged", "guess", "critic", "learning_rate", "learning_rate_critic"} <= steps[-1].keys()
    assert (steps[0]["weight_decay"], steps[-1]["weight_decay"]) == pytest.approx((0.1, 0.3))
    assert "weight_decay_critic" not in steps[-1]


def train_two(folder: Path, *, stop_at: int = -1) -> list[dict[str, Any]]:
    """The small training in two processes; what each saw and ended with. stop_at: a step in which both die."""

    def poison(step: int) -> float:
        if step == stop_at:
            die()
        return 1.0

    def work(own: Path, rank: int) -> dict[str, Any]:
        with first_gradients() as gradients:
            outcome = train_in(own, tiny(), dropout=0.0, poison=poison)
        weights = {name: value.hex() for name, value in weights_of(outcome).items()}
        return {"seen": outcome.task.seen, "weights": weights, "first": gradients}

    return run_two(folder, work, dies=stop_at >= 0)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The same rows, the same first gradient; stopped and continued, the same bytes as undisturbed."""
    with first_gradients() as alone:
        one = train_in(tmp_path / "one", tiny(), dropout=0.0)
    two = train_two(tmp_path / "two")
    for step in range(12):
        together = two[0]["seen"][step] + two[1]["seen"][step]
        assert together == one.task.seen[step] == next(rows_of_steps(step, rows=24, batch=8, seed=0)).tolist()
    assert alone
    for own, shared in zip(alone, two[0]["first"], strict=True):
        assert torch.allclose(torch.tensor(own), torch.tensor(shared), atol=1e-5)
    assert two[0]["weights"] == two[1]["weights"]
    assert not (tmp_path / "two/rank-1/scratch").exists()
    train_two(tmp_path / "stopped", stop_at=6)
    continued = train_two(tmp_path / "stopped")
    assert continued[0]["weights"] == two[0]["weights"]
    assert len(continued[0]["seen"]) == 6


def test_two_processes_end_with_the_same_best_weights(tmp_path: Path) -> None:
    """Only the first process keeps them in its draft; the other reads them there."""

    def work(own: Path, rank: int) -> dict[str, Any]:
        outcome = train_in(own, tiny(evaluate_every=3, select="best"), dropout=0.0)
        return {name: value.hex() for name, value in weights_of(outcome).items()}

    first, second = run_two(tmp_path, work)
    assert first == second
    assert not (tmp_path / "rank-1/scratch").exists()


def test_a_pass_is_the_same_whichever_process_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout: what a pass draws depends on its rows. So the gradients that are summed are the same ones."""
    config = tiny(rows_per_pass=2)
    # The running mean is each process's own.
    monkeypatch.setattr(Network, "forward", lambda self, x_BI: self.linear(self.dropout(x_BI))[:, 0])

    def work(own: Path, rank: int) -> dict[str, Any]:
        with first_gradients() as gradients:
            train_in(own, config)
        return {"first": gradients}

    with first_gradients() as alone:
        train_in(tmp_path / "one", config)
    for shared in run_two(tmp_path / "two", work):
        for own, other in zip(alone, shared["first"], strict=True):
            assert torch.allclose(torch.tensor(own), torch.tensor(other), atol=1e-5)


def test_long_trainings_write_to_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.training.metrics.TENSORBOARD_STEPS", 12)
    train_in(tmp_path, tiny())
    assert next((tmp_path / "log/tensorboard").iterdir()).name.startswith("events.out")
    train_in(tmp_path / "short", tiny(steps=11))
    assert not (tmp_path / "short/log/tensorboard").exists()


def steps_in(folder: Path) -> list[int]:
    """The steps in the log, in its order."""
    lines = [json.loads(line) for line in (folder / "log/metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["event"] == "train"]


def test_after_a_kill_the_log_has_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps after the last checkpoint come again; a line that was being written is dropped; TensorBoard shows the same."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("stages.training.metrics.TENSORBOARD_STEPS", 12)

    def poison(step: int) -> float:
        if attempt == 0 and step == 4:
            os.kill(os.getpid(), signal.SIGTERM)  # it saves step 5
        if attempt == 1 and step == 9:
            raise Killed
        return 1.0

    for attempt, error in enumerate((Terminated, Killed)):  # noqa: B007 - poison asks for the attempt
        with pytest.raises(error):
            train_in(tmp_path, tiny(evaluate_every=2), poison=poison, checkpoint_seconds=1e9)
    assert steps_in(tmp_path) == list(range(1, 10))
    with (tmp_path / "log/metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    attempt = 2
    train_in(tmp_path, tiny(evaluate_every=2), poison=poison)
    assert steps_in(tmp_path) == list(range(1, 13))
    board = EventAccumulator(str(tmp_path / "log/tensorboard")).Reload()
    assert [point.step for point in board.Scalars("train/loss")] == list(range(1, 13))
    assert [point.step for point in board.Scalars("evaluate/loss")] == list(range(2, 13, 2))


def test_a_line_says_what_is_measured_after_the_last_step(tmp_path: Path) -> None:
    said = io.StringIO()
    outcome = train_in(tmp_path, tiny(), progress=Progress(said))
    assert outcome.task.judged_rows == 24
    assert said.getvalue().splitlines()[-1] == "  measuring the result on 24 images"
