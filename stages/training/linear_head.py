"""The training of a linear layer on features as a task of the engine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from pipeline.artifact import Artifact
from smalti.arrays import MappedArray
from smalti.epoch import read_ahead
from stages.training.config import TrainingConfig
from stages.training.task import Batch, Losses, Modules, Part, Task

# R rows (views of images), P rows of this process's share, D values of a feature, L classes

PART = "head"
INIT_STD = 0.01
LOOK_AHEAD = 16  # steps whose rows are read together
ROWS = 4096  # that are judged together


class FeatureRows:
    """Features (row, value) of an artifact, each with the label of its image."""

    def __init__(self, artifact: Artifact):
        self.values = MappedArray(artifact.file("features/zarr.json").parent)
        self.labels = MappedArray(artifact.file("labels/zarr.json").parent).read()
        self.images, self.views = len(self.labels), len(self.values) // len(self.labels)

    def __len__(self) -> int:
        return len(self.values)

    def read(self, rows_R: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Features (R, D) and labels (R,)."""
        labels_R = self.labels[rows_R // self.views].astype(np.int64)
        return self.values.rows(rows_R).astype(np.float32, copy=False), labels_R


class LinearHeadTask(Task):
    """Cross entropy of one linear layer, as published without a norm before it; judged by the share of held-out rows named right."""

    unit = "rows"
    reads_ahead = True

    def __init__(
        self, config: TrainingConfig, train: FeatureRows, held_out: FeatureRows, classes: int, device: torch.device
    ):
        self.train, self.held_out, self.device = train, held_out, device
        self.head = nn.Linear(train.values.shape[1], classes)
        nn.init.normal_(self.head.weight, std=INIT_STD)
        nn.init.zeros_(self.head.bias)
        self.parts = [Part(PART, self.head, config.optimizer, config.schedule)]
        self.rows, self.epoch_images, self.judged_rows = len(train), train.images, len(held_out)

    def read(
        self, rows_of_batches: Iterator[NDArray[np.int64]], share: slice
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        return read_ahead((rows_B[share] for rows_B in rows_of_batches), self.train.read, batches=LOOK_AHEAD)

    def batch(self, step: int, data: tuple[NDArray[np.float32], NDArray[np.int64]], share: slice) -> Batch:
        features_PD, labels_P = data
        return {"features": torch.from_numpy(features_PD), "labels": torch.from_numpy(labels_P)}

    def losses(self, part: str, modules: Modules, batch: Batch, step: int) -> Losses:
        labels_P = batch["labels"]
        logits_PL = modules[PART](batch["features"])
        accuracy = (logits_PL.detach().argmax(1) == labels_P).float().mean()
        return Losses({"cross_entropy": F.cross_entropy(logits_PL, labels_P)}, {"batch_accuracy": accuracy})

    def evaluate(self) -> dict[str, float]:
        accuracy = self.share_right(self.held_out)
        return {"accuracy": accuracy, "loss": 1 - accuracy}

    def share_right(self, rows: FeatureRows) -> float:
        """Share of rows whose class is named right; each process looks at some of them."""
        right = 0
        for first in range(ROWS * self.replicas.rank, len(rows), ROWS * self.replicas.world):
            features_RD, labels_R = rows.read(np.arange(first, min(first + ROWS, len(rows))))
            with torch.no_grad():
                guess_R = self.head(torch.from_numpy(features_RD).to(self.device)).argmax(1)
            right += int((guess_R.cpu() == torch.from_numpy(labels_R)).sum())
        (share,) = self.replicas.mean_of_sums([float(right)], len(rows))
        return share
