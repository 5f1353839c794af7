"""The steps without a store: a state continues exactly, and the best weights are kept in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from stages.training.trainer import Trainer, open_trainer
from tests.stages.training.small_task import SmallTask, tiny


@contextmanager
def opened(**config: Any) -> Iterator[Trainer[SmallTask]]:
    def make_task(device: torch.device) -> SmallTask:
        return SmallTask(dropout=0.3, parts=2, poison=lambda step: 1.0)

    with open_trainer(make_task, tiny(**config), device="cpu") as trainer:
        yield trainer


def weights(trainer: Trainer[SmallTask]) -> list[torch.Tensor]:
    return [*trainer.task.network.state_dict().values(), *trainer.task.critic.state_dict().values()]


def test_a_state_continues_exactly() -> None:
    with opened(ema=0.9) as whole:
        for _ in whole.steps():
            if whole.step == 5:
                state = {name: tensor.clone() for name, tensor in whole.state().items()}
        figures = whole.finish()
    with opened(ema=0.9) as continued:
        continued.load(state, {})
        assert len(list(continued.steps())) == 7
        assert continued.finish() == figures
    assert continued.loss == whole.loss
    assert all(map(torch.equal, weights(whole), weights(continued)))


def test_the_best_weights_are_the_result() -> None:
    with opened(steps=30, evaluate_every=1, select="best") as trainer:
        seen = [trainer.evaluate()["loss"] for _ in trainer.steps()]
        assert trainer.finish()["loss"] == min(seen)
    assert seen[trainer.best_step - 1] == min(seen)


def test_threads_and_kernels_are_set_within_the_block_alone() -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with opened():
        assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (1, True)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
