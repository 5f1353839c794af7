"""A training in a draft: the steps of `trainer`, with checkpoints, a log, grids of images, and signals.

An interrupted training continues from its last checkpoint, and ends with the same bytes as one that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic

import torch

from pipeline.draft import Draft
from pipeline.durable import write_file
from pipeline.errors import NumericError
from pipeline.progress import Progress
from pipeline.runtime import Runtime, Terminated
from stages.training import checkpoints
from stages.training.checkpoints import Saver
from stages.training.config import TrainingConfig
from stages.training.metrics import Metrics
from stages.training.trainer import TaskT, Trainer, open_trainer


@dataclass(frozen=True)
class Outcome(Generic[TaskT]):
    """The result of a training.

    task: its modules hold the result.  loss: smoothed training loss.  figures: of the task's evaluation of the result.
    is_first: True in the process that writes the artifact.
    """

    task: TaskT
    loss: float
    figures: dict[str, float]
    is_first: bool


def train(
    make_task: Callable[[torch.device], TaskT], config: TrainingConfig, out: Draft, run: Runtime, *, label: str
) -> Outcome[TaskT]:
    """Train what `make_task(device)` builds, from the draft's newest checkpoint on.

    NumericError: a loss or gradient is not finite.  CorruptError: the checkpoint does not fit.  MemoryExhausted.
    """
    with open_trainer(make_task, config, device=run.device, threads_of_torch=run.threads) as trainer:
        saver = Saver(out)
        _resume(trainer, saver)
        with saver, _naming_the_checkpoint(saver):
            _make_steps(trainer, saver, run if trainer.is_first else replace(run, progress=Progress()), label)
        return Outcome(trainer.task, trainer.loss, trainer.finish(), trainer.is_first)


def _resume(trainer: Trainer[TaskT], saver: Saver) -> None:
    """Continue from the newest checkpoint of the draft, if there is one."""
    newest = checkpoints.newest_checkpoint(saver.out) if trainer.is_first else None
    name = trainer.replicas.from_first(str(newest or ""))
    if not name:
        return
    path = Path(name)
    state = checkpoints.read_state(path)
    checkpoints.check_fits(state, trainer.state(), path)
    best_step = int(state["engine.best_step"])
    trainer.load(state, checkpoints.read_state(checkpoints.best_beside(path, best_step)) if best_step else {})
    saver.last = f"step {trainer.step}"


@contextmanager
def _naming_the_checkpoint(saver: Saver) -> Iterator[None]:
    """Add the last good checkpoint to a NumericError."""
    try:
        yield
    except NumericError as error:
        saver.wait()
        said = f"{error.message}; the last good checkpoint is {saver.last}"
        raise NumericError(said, path=saver.out.path, hint=error.hint) from error


def _make_steps(trainer: Trainer[TaskT], saver: Saver, run: Runtime, label: str) -> None:
    task, config, first = trainer.task, trainer.config, trainer.step
    images = task.epoch_images or task.rows
    shown = dict[str, float]()
    with (
        Metrics(run, config, images=images, first_step=first, has_board=trainer.is_first) as metrics,
        run.deferred() as stop,
        run.progress.bar(label, total=config.steps * config.batch, unit=task.unit) as bar,
    ):
        bar.skip(first * config.batch)
        for losses in trainer.steps():
            bar.advance(config.batch, loss=trainer.loss, **shown)
            saver.check()
            is_last = trainer.step == config.steps
            is_late = trainer.is_first and saver.is_due(run.checkpoint_seconds)
            leaves, saves = trainer.replicas.any(stop.requested is not None, is_late or is_last)
            is_logged = metrics.is_due(trainer.step)
            if trainer.step == first + 1 or is_logged or leaves or saves:
                trainer.check_replicas()
            if is_logged:
                figures = trainer.figures(losses)
                metrics.write(trainer.step, figures)
                shown = {name: figures[name] for name in task.shown if name in figures}
                warn(run, trainer.step, task.warning(trainer.step - 1, figures))
            if config.evaluate_every and trainer.step % config.evaluate_every == 0:
                metrics.record("evaluate", trainer.step, trainer.evaluate())
                _keep_best(trainer, saver)
            if task.draws_every and trainer.step % task.draws_every == 0:
                _write_drawings(trainer, run.log)
            if trainer.is_first and (leaves or saves):
                saver.save(trainer.step, trainer.state(), best_step=trainer.best_step, waits=leaves or is_last)
            if leaves:
                stop.requested = stop.requested or Terminated
                stop.leave()
    if task.judged_rows:
        run.progress.say(f"  measuring the result on {task.judged_rows} {task.unit}")


def _keep_best(trainer: Trainer[TaskT], saver: Saver) -> None:
    """Keep weights better than all before; the old best goes only when a checkpoint knows of the new one."""
    if trainer.is_first and trainer.best_step == trainer.step:
        saver.wait()
        checkpoints.save_best(saver.out, trainer.step, trainer.best)


def _write_drawings(trainer: Trainer[TaskT], folder: Path) -> None:
    drawings = trainer.draw()
    if trainer.is_first:
        for name, data in drawings.items():
            write_file(folder / name, data)


def warn(run: Runtime, step: int, sentence: str | None) -> None:
    """Print and log a task's advice after `step` steps, if any."""
    if sentence is not None:
        run.progress.say(f"  warning: {sentence}")
        run.progress.record("warning", step=step, text=sentence)
