"""The training of a generator as a task of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.generators.generator import Generator, build_generator
from smalti.epoch import read_ahead
from stages.training.config import TrainGeneratorConfig
from stages.training.draws import stream
from stages.training.grids import draw_samples
from stages.training.task import Batch, Losses, Modules, Part, Task
from stages.training.tokens import TrainingTokens
from stages.weights.cards import GeneratorCard
from stages.weights.networks import NetworkFile

# B rows of a global batch, P rows of this process's share, T tokens

PART = "generator"
LOOK_AHEAD = 64  # steps whose rows are read together from mapped sets


class GeneratorTraining(nn.Module):
    """A generator as a module whose forward is its loss, for data parallel training."""

    def __init__(self, generator: Generator):
        super().__init__()
        self.generator = generator

    def forward(
        self, codes: Tensor, condition: Tensor | None = None, **draws: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.generator.loss(codes, condition, **draws)


class GeneratorTask(Task):
    """The generator's loss, with its draws for a step; evaluated without draws."""

    unit = "rows"

    def __init__(
        self,
        config: TrainGeneratorConfig,
        card: GeneratorCard,
        tokens: TrainingTokens,
        held_out: TrainingTokens | None,
        device: torch.device,
        *,
        tokenizer: NetworkFile | None = None,
    ):
        """tokenizer: what makes images of the samples that are drawn on the way, if some are."""
        self.config, self.card, self.tokens, self.held_out, self.device = config, card, tokens, held_out, device
        self.tokenizer = tokenizer
        self.network = build_generator(card.model, card.shape)
        training, self.training_module = config.training, GeneratorTraining(self.network)
        self.parts = [
            Part(
                PART,
                self.training_module,
                training.optimizer,
                training.schedule,
                is_decayed=lambda name, parameter: self.network.decayed(name.removeprefix("generator."), parameter),
            )
        ]
        self.network.checkpoint_blocks = config.checkpoints_activations
        if config.compiles:
            for block in self.network.repeated_blocks():  # alike as they are, they share what the first one took
                block.compile()
        self.draws_every = config.samples.every if config.samples else 0
        self.rows, self.epoch_images = len(tokens), tokens.images
        self.judged_rows = len(held_out) if held_out else 0
        # Loaded rows are read at once, but their orders take a while to draw, for which no GPU should wait.
        self.reads_ahead = not tokens.are_loaded or device.type == "cuda"

    def read(
        self, rows_of_batches: Iterator[NDArray[np.int64]], share: slice
    ) -> Iterator[tuple[NDArray[np.int64], ...]]:
        """Codes, and labels or codes of their condition, of this process's share; of many steps together where sets are mapped."""
        together = 1 if self.tokens.are_loaded else LOOK_AHEAD
        return read_ahead((rows_B[share] for rows_B in rows_of_batches), self.tokens.read, batches=together)

    def batch(self, step: int, data: tuple[NDArray[np.int64], ...], share: slice) -> Batch:
        """Codes (P, T), their condition, and what the generator draws, of this process's share of the rows."""
        codes_PT, given_P = data
        streams = partial(stream, self.config.training.seed, step=step)
        drawn = self.network.draws(streams, self.config.training.batch, step)
        return {
            "codes": torch.from_numpy(codes_PT),
            **self._condition(given_P),
            **{name: torch.from_numpy(values_B[share]) for name, values_B in drawn.items()},
        }

    def _condition(self, given_P: NDArray[np.int64]) -> dict[str, Tensor]:
        return {} if self.card.model.conditions_on == "none" else {"condition": torch.from_numpy(given_P)}

    def losses(self, part: str, modules: Modules, batch: Batch, step: int) -> Losses:
        loss, stats = modules[PART](**batch)
        return Losses({"cross_entropy": loss}, stats)

    def evaluate(self) -> dict[str, float]:
        """Mean loss and accuracy on the held-out token set, if there is one; passes are split between processes."""
        if self.held_out is None:
            return {}
        rows, count = self.config.rows_per_pass, len(self.held_out)
        sums = torch.zeros(2, dtype=torch.float64)
        for first in range(rows * self.replicas.rank, count, rows * self.replicas.world):
            rows_P = np.arange(first, min(first + rows, count))
            codes_PT, given_P = self.held_out.read(rows_P)
            batch = {"codes": torch.from_numpy(codes_PT), **self._condition(given_P)}
            with self.replicas.autocast():
                loss, stats = self.training_module(**{name: tensor.to(self.device) for name, tensor in batch.items()})
            sums += len(rows_P) * torch.tensor([float(loss), float(stats["correct"])], dtype=torch.float64)
        loss, correct = self.replicas.mean_of_sums(sums.tolist(), count)
        return {"loss": loss, "correct": correct}

    def draw(self, step: int) -> dict[str, bytes]:
        """A grid of samples; every process draws and decodes its share."""
        assert self.config.samples is not None
        assert self.tokenizer is not None
        grid = draw_samples(self.config.samples, self.card, self.network, self.tokenizer, self.replicas, step)
        return {f"samples-{step:08d}.png": grid} if grid else {}
