"""The training engine: steps of one or several optimizers, saved so that an interrupted training continues exactly.

`train` is the story. A step depends on (state, seed, step) alone: data and draws by `draws`, torch's generator seeded
before it. So a training that was stopped anywhere ends with the same bytes as one that was not (same device kind,
threads and number of processes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from models.batch_part import BatchPart
from models.losses.adversarial import spread_statistics
from pipeline.draft import Draft
from pipeline.durable import write_file
from pipeline.errors import NumericError
from pipeline.progress import Progress
from pipeline.runtime import Runtime, Terminated
from stages.devices import deterministic_kernels, products, threads
from stages.training import checkpoints
from stages.training.batches import Buffers, SharedPasses, copy_buffers, put_buffers, read_batches
from stages.training.checkpoints import Saver
from stages.training.config import TrainingConfig
from stages.training.draws import passes_of, torch_seed
from stages.training.metrics import Metrics
from stages.training.replicas import Replicas
from stages.training.rows import explain_out_of_memory
from stages.training.task import Batch, Losses, Task
from stages.training.trained_part import TrainedPart

SMOOTHING = 0.98  # of the loss that is shown and reported

TaskT = TypeVar("TaskT", bound=Task)


@dataclass(frozen=True)
class Outcome(Generic[TaskT]):
    """What a training ended with.

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

    The task is built with torch's generator seeded by config.seed.
    NumericError: a loss or gradient is not finite.  CorruptError: the checkpoint does not fit.  MemoryExhausted.
    """
    replicas = Replicas(device=run.device, precision=config.precision)
    with ExitStack() as around:
        around.enter_context(threads(run.threads))
        around.enter_context(products(config.precision))
        around.enter_context(deterministic_kernels(replicas.device, is_deterministic=config.is_deterministic))
        around.enter_context(explain_out_of_memory(config, replicas.world))
        replicas.seed(torch_seed(config.seed, "first weights", 0))
        task = make_task(replicas.device)
        task.replicas = replicas
        trainer = Trainer(task, config, replicas, out)
        trainer.resume()
        with trainer.saver:
            _run_steps(trainer, config, run if trainer.is_first else _silent(run), label)
        return Outcome(task, trainer.loss, trainer.finish(), trainer.is_first)


def _run_steps(trainer: Trainer, config: TrainingConfig, run: Runtime, label: str) -> None:
    task, first = trainer.task, trainer.step
    shown = dict[str, float]()
    with (
        _open_metrics(trainer, config, run) as metrics,
        run.deferred() as stop,
        run.progress.bar(label, total=config.steps * config.batch, unit=task.unit) as bar,
    ):
        bar.skip(first * config.batch)
        for batch in read_batches(task, config, trainer.replicas, first):
            step = trainer.step
            losses = trainer.advance(batch)
            bar.advance(config.batch, loss=trainer.loss, **shown)
            trainer.saver.check()
            is_late, is_last = (
                trainer.is_first and trainer.saver.is_due(run.checkpoint_seconds),
                step + 1 == config.steps,
            )
            leaves, saves = trainer.replicas.any(stop.requested is not None, is_late or is_last)
            if step == first or metrics.is_due(step) or leaves or saves:
                trainer.check_replicas()
            if metrics.is_due(step):
                figures = trainer.figures(losses)
                metrics.write(step, figures)
                shown = {name: figures[name] for name in task.shown if name in figures}
                warn(run, step + 1, task.warning(step, figures))
            if config.evaluate_every and (step + 1) % config.evaluate_every == 0:
                metrics.record("evaluate", step + 1, trainer.evaluate())
            if task.draws_every and (step + 1) % task.draws_every == 0:
                trainer.draw(run.log)
            if leaves or saves:
                trainer.save(waits=leaves or is_last)
            if leaves:
                stop.requested = stop.requested or Terminated
                stop.leave()
    if task.judged_rows:
        run.progress.say(f"  measuring the result on {task.judged_rows} {task.unit}")


def _open_metrics(trainer: Trainer, config: TrainingConfig, run: Runtime) -> Metrics:
    return Metrics(
        run,
        steps=config.steps,
        batch=config.batch,
        images=trainer.task.epoch_images or trainer.task.rows,
        first_step=trainer.step,
        has_board=trainer.is_first,
    )


class Trainer:
    """State of a training and the ways to change it: `advance` by a step, `evaluate`, `save`, `resume`, `finish`."""

    def __init__(self, task: Task, config: TrainingConfig, replicas: Replicas, out: Draft):
        self.task, self.config, self.replicas, self.out = task, config, replicas, out
        self.parts = [TrainedPart(part, config, replicas) for part in task.parts]
        self.modules = {trained.part.name: trained.wrapped for trained in self.parts}
        self.main = self.parts[0]
        self.turns = sorted(self.parts, key=lambda trained: not trained.part.goes_first)
        self.step = self.bad_steps = self.best_step = 0
        self.loss = self.best_loss = math.inf
        self.saver = Saver(out)
        self.pieces = passes_of(config.batch // replicas.world, config.rows)
        for part in task.parts:
            spread_statistics(part.module, self.pieces)

    @property
    def is_first(self) -> bool:
        return self.replicas.rank == 0

    def advance(self, batch: Batch) -> Losses:
        """One step of every part on this process's share of the batch; counts a bad one, or raises NumericError."""
        self._seed(0)
        turns = [trained for trained in self.turns if self.step >= trained.part.first_step]
        buffers = self._copy_of_buffers(self.parts) if self.config.skip_bad_steps else []
        passes = self._passes(batch, turns)
        seen = Losses({}, {})
        for trained in turns:
            losses = self._gradients(trained, passes, is_last=trained is turns[-1])
            loss, norm = self._clip(trained, losses)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._count_bad_step(trained, losses, loss, norm)
                put_buffers(buffers)
                break
            trained.update(self.step, self.config.steps)
            seen = Losses(seen.losses | losses.losses, seen.stats | losses.stats)
            if trained is self.main:
                self.loss = loss if math.isinf(self.loss) else SMOOTHING * self.loss + (1 - SMOOTHING) * loss
        else:
            for trained in self.parts:
                if trained.average is not None:
                    trained.average.update(self.step)
        self.step += 1
        return seen

    def figures(self, losses: Losses) -> dict[str, float]:
        """Plain numbers of a step for the log."""
        named = losses.losses | losses.stats
        values = self.replicas.mean(torch.stack([value.detach().float() for value in named.values()])) if named else []
        rates = {
            "learning_rate" if place == 0 else f"learning_rate_{trained.part.name}": trained.rate(
                self.step - 1, self.config.steps
            )
            for place, trained in enumerate(self.parts)
        }
        return {"loss": self.loss, **dict(zip(named, values, strict=True)), **rates}

    def check_replicas(self) -> None:
        """NumericError unless all processes hold the same codebook, or what else the task names."""
        odd = self.replicas.unequal(self.task.replicated())
        if odd:
            raise NumericError(
                f"after step {self.step} the processes no longer hold the same {', '.join(odd)}; "
                f"the last good checkpoint is {self.saver.last}",
                path=self.out.path,
                hint="give all processes the same version of everything and the same kind of device, and run again",
            )

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data, with the weights that would be the result; keeps the best ones if asked to."""
        with self._judging():
            figures = self.task.evaluate()
            if self.config.select == "best" and figures.get("loss", math.inf) < self.best_loss:
                self._keep_best(figures["loss"])
        return figures

    def draw(self, folder: Path) -> None:
        """Put the task's drawings into a folder (the first process alone), made with the weights that would be the result."""
        with self._judging():
            drawings = self.task.draw(self.step)
        if self.is_first:
            for name, data in drawings.items():
                write_file(folder / name, data)

    def save(self, *, waits: bool) -> None:
        """Write a checkpoint (the first process alone). waits: until it is there."""
        if not self.is_first:
            return
        numbers = {
            "step": self.step,
            "bad_steps": self.bad_steps,
            "best_step": self.best_step,
            "loss": self.loss,
            "best_loss": self.best_loss,
        }
        state = {f"engine.{name}": torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        self.saver.save(self.step, state | self._state(), best_step=self.best_step, waits=waits)

    def resume(self) -> None:
        """Continue from the newest checkpoint of the draft, if there is one."""
        path = checkpoints.newest_checkpoint(self.out) if self.is_first else None
        name = self.replicas.from_first(str(path or ""))
        if name:
            self._load(Path(name))
        for trained in self.parts:
            trained.part.module.train()

    def finish(self) -> dict[str, float]:
        """Leave the resulting weights in the parts' modules, ready for use, and evaluate them."""
        if self.config.select == "best" and self.best_step:
            self._load_best()
        for trained in self.parts:
            self.replicas.unwrap(trained.wrapped)
            self.replicas.share_buffers(trained.part.module)
            if trained.average is not None and not self.best_step:
                trained.average.put()
            trained.optimizer.zero_grad(set_to_none=True)
            trained.part.module.eval()
        with torch.no_grad():
            return self.task.evaluate()

    @contextmanager
    def _judging(self) -> Iterator[None]:
        """Within this block the modules are in evaluation mode, with the weights that would be the result."""
        with ExitStack() as averaged, torch.no_grad():
            for trained in self.parts:
                self.replicas.share_buffers(trained.part.module)
                trained.part.module.eval()
                if trained.average is not None:
                    averaged.enter_context(trained.average.in_place())
            yield
        for trained in self.parts:
            trained.part.module.train()

    def _seed(self, piece: int) -> None:
        """Let what torch draws depend on the step and on the rows of a pass, whichever process makes it."""
        self.replicas.seed(torch_seed(self.config.seed, "step", self.step, self._part(piece).number))

    def _passes(self, batch: Batch, turns: list[TrainedPart]) -> SharedPasses:
        """The passes of this step over its batch, on the device."""
        there = [tensor.to(self.replicas.device, non_blocking=True).chunk(self.pieces) for tensor in batch.values()]
        pieces: list[Batch] = [dict(zip(batch, piece, strict=True)) for piece in zip(*there, strict=True)]
        self.task.part = self._part(0)
        if len(pieces) > 1:
            self.task.survey(pieces)
        is_made_twice = self.pieces > 1 and turns[0] is not self.main
        buffers = self._copy_of_buffers([self.main]) if is_made_twice else []
        return SharedPasses(
            pieces,
            lambda piece: self.task.shared_pass(self.modules, piece, self.step),
            begin_again=lambda: put_buffers(buffers),
        )

    def _part(self, piece: int) -> BatchPart:
        return BatchPart(piece, self.pieces, self.replicas.rank, self.replicas.world)

    def _gradients(self, trained: TrainedPart, passes: SharedPasses, *, is_last: bool) -> Losses:
        """Fill the gradients of one part; losses and stats are the means over the pieces of the batch.

        is_last: no part comes after it in this step.
        """
        self._let_train(trained)
        found: list[Losses] = []
        for number in range(len(passes)):
            is_exchanged = number + 1 == len(passes)
            with nullcontext() if is_exchanged else self.replicas.without_exchange(list(self.modules.values())):
                self.task.part = self._part(number)
                self._seed(number)
                seen = passes.take(number, is_main=trained is self.main, is_kept=not is_last)
                losses = self.task.losses(trained.part.name, self.modules, seen, self.step)
                total = torch.stack(list(losses.losses.values())).sum()
                self.replicas.backward(total / len(passes))
            found.append(Losses(_detached(losses.losses), _detached(losses.stats)))
        return (
            found[0]
            if len(found) == 1
            else Losses(_means([one.losses for one in found]), _means([one.stats for one in found]))
        )

    def _let_train(self, trained: TrainedPart) -> None:
        """Clear the part's gradients; while the main part is trained, they go through the others but stay in none."""
        trained.optimizer.zero_grad(set_to_none=True)
        for other in self.parts:
            if other is not self.main:
                for parameter in other.parameters:
                    parameter.requires_grad_(other is trained)

    def _clip(self, trained: TrainedPart, losses: Losses) -> tuple[float, float]:
        """Loss and gradient norm, the same numbers in every process, after clipping."""
        limit = math.inf if self.config.clip is None else self.config.clip
        norm = nn.utils.clip_grad_norm_(trained.parameters, limit)
        total = torch.stack(list(losses.losses.values())).sum()
        loss, norm_value = self.replicas.mean(torch.stack([total.float(), norm.float()]))
        return loss, norm_value

    def _count_bad_step(self, trained: TrainedPart, losses: Losses, loss: float, norm: float) -> None:
        self.bad_steps += 1
        trained.optimizer.zero_grad(set_to_none=True)
        if self.bad_steps <= self.config.skip_bad_steps:
            return
        self.saver.wait()
        terms = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.losses.items())
        allowed = f" (step number {self.bad_steps} of this kind)" if self.config.skip_bad_steps else ""
        raise NumericError(
            f"step {self.step} of {trained.part.name} has loss {loss} ({terms}) and gradient norm {norm}{allowed}; "
            f"the last good checkpoint is {self.saver.last}",
            path=self.out.path,
            hint="lower training.optimizer.learning_rate or training.clip, or let training.skip_bad_steps pass some",
        )

    def _copy_of_buffers(self, parts: list[TrainedPart]) -> Buffers:
        return [one for trained in parts for one in copy_buffers(trained.part.module)]

    def _state(self) -> checkpoints.State:
        return {name: tensor for trained in self.parts for name, tensor in trained.state().items()}

    def _load(self, path: Path) -> None:
        state = checkpoints.read_state(path)
        own = {name: tensor for name, tensor in self._state().items() if not name.startswith("optimizer.")}
        found = {name: tensor for name, tensor in state.items() if not name.startswith(("optimizer.", "engine."))}
        checkpoints.check_fits(found, own, path)
        for trained in self.parts:
            trained.load(state)
        numbers = {name: float(tensor) for name, tensor in checkpoints.part_of(state, "engine.").items()}
        self.step, self.bad_steps = int(numbers["step"]), int(numbers["bad_steps"])
        self.best_step = int(numbers["best_step"])
        self.loss, self.best_loss = numbers["loss"], numbers["best_loss"]
        self.saver.last = f"step {self.step}"

    def _keep_best(self, loss: float) -> None:
        """Keep weights better than all before; the old best goes only when a checkpoint knows of the new one."""
        self.best_loss, self.best_step = loss, self.step
        if self.is_first:
            weights = {name: one for name, one in self._state().items() if name.startswith("model.")}
            self.saver.wait()
            checkpoints.save_best(self.out, self.step, weights)

    def _load_best(self) -> None:
        path = self.replicas.from_first(str(checkpoints.best_file(self.out, self.best_step)))
        state = checkpoints.read_state(Path(path))
        for trained in self.parts:
            trained.part.module.load_state_dict(checkpoints.part_of(state, f"model.{trained.part.name}."))


def warn(run: Runtime, step: int, sentence: str | None) -> None:
    """Say and log a task's advice after `step` steps, if it has some."""
    if sentence is not None:
        run.progress.say(f"  warning: {sentence}")
        run.progress.record("warning", step=step, text=sentence)


def _silent(run: Runtime) -> Runtime:
    """The runtime of a process other than the first: it shows and logs nothing."""
    return replace(run, progress=Progress())


def _detached(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in named.items()}


def _means(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in found]).mean() for name in found[0]}
