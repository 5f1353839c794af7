"""The steps of a training, of one or several optimizers: all that a task and a `TrainingConfig` need, without a store.

    with open_trainer(make_task, TrainingConfig(steps=200)) as trainer:
        for losses in trainer.steps():
            print(trainer.step, trainer.figures(losses))
        print(trainer.finish())

A step depends on (state, seed, step) alone: data and draws by `draws`, torch's generator seeded before it. So a training
that takes up the `state` of another ends with the same bytes (same device kind, threads and number of processes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from models.batch_part import BatchPart
from models.losses.adversarial import spread_statistics
from pipeline.errors import NumericError
from stages.devices import deterministic_kernels, products, threads
from stages.training.batches import Buffers, SharedPasses, copy_buffers, put_buffers, read_batches
from stages.training.config import TrainingConfig
from stages.training.draws import passes_of, torch_seed
from stages.training.replicas import Replicas
from stages.training.rows import explain_out_of_memory
from stages.training.task import Batch, Losses, Task
from stages.training.trained_part import State, TrainedPart, part_of

SMOOTHING = 0.98  # of the loss that is shown and reported
NUMBERS = ("step", "bad_steps", "best_step", "loss", "best_loss")  # of the trainer, which its state holds

TaskT = TypeVar("TaskT", bound=Task)


@contextmanager
def open_trainer(
    make_task: Callable[[torch.device], TaskT],
    config: TrainingConfig,
    *,
    device: str = "auto",
    threads_of_torch: int = 1,
) -> Iterator[Trainer[TaskT]]:
    """A trainer of the task that `make_task(device)` builds, before its first step.

    Within the block torch has the threads, precision and kernels of the training. The task is built with torch's generator
    seeded by config.seed.  device: auto, cpu, cuda or cuda:N.
    NumericError: a loss or gradient is not finite.  MemoryExhausted.  UsageError: device or batch do not fit.
    """
    replicas = Replicas(device=device, precision=config.precision)
    with ExitStack() as around:
        around.enter_context(threads(threads_of_torch))
        around.enter_context(products(config.precision))
        around.enter_context(deterministic_kernels(replicas.device, is_deterministic=config.is_deterministic))
        around.enter_context(explain_out_of_memory(config, replicas.world))
        replicas.seed(torch_seed(config.seed, "first weights", 0))
        yield Trainer(make_task(replicas.device), config, replicas)


class Trainer(Generic[TaskT]):
    """State of a training and the ways to change it: `steps`, `evaluate`, `load`, `finish`.

    step: steps that are done.  loss: of the main part, smoothed.  best: the best evaluated weights, made after `best_step`
    steps, by name as in `state`, in host memory; empty unless config.select is "best".
    """

    def __init__(self, task: TaskT, config: TrainingConfig, replicas: Replicas):
        self.task, self.config, self.replicas = task, config, replicas
        self.parts = [TrainedPart(part, config, replicas) for part in task.parts]
        self.modules = {trained.part.name: trained.wrapped for trained in self.parts}
        self.main = self.parts[0]
        self.turns = sorted(self.parts, key=lambda trained: not trained.part.goes_first)
        self.step = self.bad_steps = self.best_step = 0
        self.loss = self.best_loss = math.inf
        self.best: State = {}
        self.pieces = passes_of(config.batch // replicas.world, config.rows)
        task.replicas = replicas
        for part in task.parts:
            part.module.train()
            spread_statistics(part.module, self.pieces)

    @property
    def is_first(self) -> bool:
        return self.replicas.rank == 0

    def steps(self) -> Iterator[Losses]:
        """Run the remaining steps; yields the losses of each."""
        for batch in read_batches(self.task, self.config, self.replicas, self.step):
            yield self.advance(batch)

    def advance(self, batch: Batch) -> Losses:
        """One step of every part on this process's share of the batch; counts a bad one, or raises NumericError."""
        self._seed(0)
        buffers = self._copy_of_buffers(self.parts) if self.config.skip_bad_steps else []
        passes = self._passes(batch)
        seen = Losses({}, {})
        for trained in self.turns:
            losses = self._gradients(trained, passes, is_last=trained is self.turns[-1])
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
            name if trained is self.main else f"{name}_{trained.part.name}": value
            for trained in self.parts
            for name, value in trained.rates(self.step - 1, self.config.steps).items()
        }
        return {"loss": self.loss, **dict(zip(named, values, strict=True)), **rates}

    def check_replicas(self) -> None:
        """NumericError unless all processes hold the same codebook, or what else the task names."""
        odd = self.replicas.unequal(self.task.replicated())
        if odd:
            raise NumericError(
                f"after step {self.step} the processes no longer hold the same {', '.join(odd)}",
                hint="give all processes the same version of everything and the same kind of device, and run again",
            )

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data, with averaged weights if ema is set; keeps the best weights if select is "best"."""
        with self._judging():
            figures = self.task.evaluate()
            if self.config.select == "best" and figures.get("loss", math.inf) < self.best_loss:
                self.best_loss, self.best_step = figures["loss"], self.step
                weights = {name: one for name, one in self._state().items() if name.startswith("model.")}
                self.best = {name: one.detach().to("cpu", copy=True) for name, one in weights.items()}
        return figures

    def draw(self) -> Mapping[str, bytes]:
        """The task's files for the log by name, with averaged weights if ema is set."""
        with self._judging():
            return self.task.draw(self.step)

    def state(self) -> State:
        """Everything that the next step depends on, and what was counted so far: tensors by name, not copied."""
        numbers = {f"engine.{name}": torch.tensor(getattr(self, name), dtype=torch.float64) for name in NUMBERS}
        return numbers | self._state()

    def load(self, state: State, best: State) -> None:
        """Continue from a state that fits, and the `best` weights that there were."""
        for trained in self.parts:
            trained.load(state)
        for name, tensor in part_of(state, "engine.").items():
            setattr(self, name, float(tensor) if name.endswith("loss") else int(tensor))
        self.best = best

    def finish(self) -> dict[str, float]:
        """Leave the resulting weights in the parts' modules, ready for use, and evaluate them."""
        for trained in self.parts:
            if self.best_step:
                trained.part.module.load_state_dict(part_of(self.best, f"model.{trained.part.name}."))
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
        """Within this block the modules are in evaluation mode, with averaged weights if ema is set."""
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

    def _passes(self, batch: Batch) -> SharedPasses:
        """The passes of this step over its batch, on the device."""
        there = [tensor.to(self.replicas.device, non_blocking=True).chunk(self.pieces) for tensor in batch.values()]
        pieces: list[Batch] = [dict(zip(batch, piece, strict=True)) for piece in zip(*there, strict=True)]
        self.task.part = self._part(0)
        if len(pieces) > 1:
            self.task.survey(pieces)
        is_made_twice = self.pieces > 1 and self.turns[0] is not self.main
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
        terms = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.losses.items())
        allowed = f" (step number {self.bad_steps} of this kind)" if self.config.skip_bad_steps else ""
        raise NumericError(
            f"step {self.step} of {trained.part.name} has loss {loss} ({terms}) and gradient norm {norm}{allowed}",
            hint="lower training.optimizer.learning_rate or training.clip, or let training.skip_bad_steps pass some",
        )

    def _copy_of_buffers(self, parts: list[TrainedPart]) -> Buffers:
        return [one for trained in parts for one in copy_buffers(trained.part.module)]

    def _state(self) -> State:
        return {name: tensor for trained in self.parts for name, tensor in trained.state().items()}


def _detached(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in named.items()}


def _means(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in found]).mean() for name in found[0]}
