"""A training small enough to be run dozens of times: dropout, a buffer, and, if asked, a second optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.cluster import InProcess
from pipeline.draft import Draft, Request
from pipeline.progress import Progress
from pipeline.runtime import Runtime
from stages.training.config import AdamW, OneCycle, TrainingConfig
from stages.training.draws import stream
from stages.training.engine import Outcome, train
from stages.training.task import Batch, Losses, Modules, Part, Task
from stages.training.trained_part import TrainedPart
from stages.training.trainer import Trainer

ROWS, INPUTS = 24, 6
SCHEDULE = OneCycle()
OPTIMIZER = AdamW(learning_rate=0.05, weight_decay=0.1, weight_decay_end=0.3)
Poison = Callable[[int], float]


class Network(nn.Module):
    """A linear layer behind dropout, and a running mean of its inputs."""

    mean_I: Tensor

    def __init__(self, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(INPUTS, 1)
        self.register_buffer("mean_I", torch.zeros(INPUTS))

    def forward(self, x_BI: Tensor) -> Tensor:
        y_B: Tensor = self.linear(self.dropout(x_BI - self.mean_I))[:, 0]
        if self.training:
            self.mean_I = self.mean_I.lerp(x_BI.detach().mean(0), 0.1)
        return y_B


class SmallTask(Task):
    """Regression on rows that are functions of their number; `poison(step)` multiplies the loss."""

    def __init__(self, *, dropout: float, parts: int, poison: Poison, critic_first: bool = False):
        self.rows = self.judged_rows = ROWS
        self.poison = poison
        self.network, self.critic = Network(dropout), nn.Linear(1, 1)
        self.parts = [Part("main", self.network, OPTIMIZER, SCHEDULE)]
        if parts == 2:
            self.parts.append(Part("critic", self.critic, AdamW(learning_rate=0.02), SCHEDULE, goes_first=critic_first))
        self.seen: list[list[int]] = []
        self.evaluations = 0
        self.passes: list[tuple[float, bool]] = []

    def batch(self, step: int, rows_B: NDArray[np.int64], share: slice) -> Batch:
        self.seen.append(rows_B[share].tolist())
        noise_BI = stream(0, "noise", step).normal(0, 0.1, (len(rows_B), INPUTS))
        x_BI = np.stack([np.random.default_rng(row).normal(size=INPUTS) for row in rows_B]) + noise_BI
        x_PI = torch.from_numpy(x_BI[share]).float()
        return {"x": x_PI, "target": torch.from_numpy(x_BI[share].sum(1)).float()}

    def shared_pass(self, modules: Modules, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Guesses of the main part, and targets."""
        guess_B = modules["main"](batch["x"])
        self.passes.append((float(guess_B.detach().sum()), guess_B.requires_grad))
        return guess_B, batch["target"]

    def losses(self, part: str, modules: Modules, batch: Any, step: int) -> Losses:
        guess_B, target_B = batch
        if part == "critic":
            return Losses(
                {"critic": (modules["critic"](guess_B.detach()[:, None])[:, 0] - target_B).square().mean()}, {}
            )
        error = (guess_B - target_B).square().mean() * self.poison(step)
        judged = {"judged": 0.1 * modules["critic"](guess_B[:, None]).square().mean()} if len(self.parts) == 2 else {}
        return Losses({"error": error, **judged}, {"guess": guess_B.detach().mean()})

    def evaluate(self) -> dict[str, float]:
        """Squared distance of the weights from the solution, all ones."""
        self.evaluations += 1
        return {"loss": float((self.network.linear.weight - 1).square().sum())}


def tiny(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"steps": 12, "batch": 8, **changes})


def draft_in(folder: Path) -> Draft:
    return Draft.open(folder, Request("train-small", "small", 1, "0" * 64, {}, {}, {}))


def runtime_in(folder: Path, **changes: Any) -> Runtime:
    log = folder / "log"
    log.mkdir(parents=True, exist_ok=True)
    values = {"device": "cpu", "checkpoint_seconds": 0.0, "progress": Progress(None, log / "metrics.jsonl"), **changes}
    return Runtime(cluster=InProcess(), log=log, **values)


def train_in(
    folder: Path,
    config: TrainingConfig,
    *,
    dropout: float = 0.3,
    parts: int = 1,
    poison: Poison = lambda step: 1.0,
    critic_first: bool = False,
    **runtime: Any,
) -> Outcome[SmallTask]:
    """Train, or continue to train, in the draft of this folder."""

    def make_task(device: torch.device) -> SmallTask:
        return SmallTask(dropout=dropout, parts=parts, poison=poison, critic_first=critic_first)

    return train(make_task, config, draft_in(folder), runtime_in(folder, **runtime), label="small")


def weights_of(outcome: Outcome[SmallTask]) -> dict[str, bytes]:
    """Every tensor's bytes."""
    task = outcome.task
    named = {**task.network.state_dict(), **{f"critic.{name}": one for name, one in task.critic.state_dict().items()}}
    return {name: tensor.numpy().tobytes() for name, tensor in named.items()}


@contextmanager
def first_gradients() -> Iterator[list[list[float]]]:
    """Yield a list that receives the gradients of the first step of a training: one list per parameter."""
    found: list[list[float]] = []
    clip = Trainer._clip

    def look_and_clip(self: Trainer, trained: TrainedPart, losses: Losses) -> tuple[float, float]:
        if not found:
            found.extend(one.grad.flatten().tolist() for one in trained.parameters if one.grad is not None)
        return clip(self, trained, losses)

    Trainer._clip = look_and_clip  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Trainer._clip = clip  # type: ignore[method-assign]
