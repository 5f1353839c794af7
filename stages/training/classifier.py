"""The training of a classifier as a task of the engine."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.classifiers.config import BUILDERS
from models.registry import build
from stages.images.passes import unit_pixels
from stages.training.config import TrainClassifierConfig
from stages.training.images import TrainingImages, mean_figure
from stages.training.task import Batch, Losses, Modules, Part, Task

PART = "classifier"


class ClassifierTask(Task):
    """Cross entropy of drawn views; evaluated by the accuracy on upright images."""

    def __init__(
        self, config: TrainClassifierConfig, images: TrainingImages, judged: TrainingImages, device: torch.device
    ):
        self.config, self.images, self.judged, self.device = config, images, judged, device
        self.network = build(config.model, BUILDERS)
        self.parts = [Part(PART, self.network, config.training.optimizer, config.training.schedule)]
        self.rows, self.judged_rows = len(images), len(judged)
        self.reads_ahead = not images.is_cached

    def batch(self, step: int, rows_B: NDArray[np.int64], share: slice) -> Batch:
        return self.images.batch(step, rows_B, share)

    def losses(self, part: str, modules: Modules, batch: Batch, step: int) -> Losses:
        labels_B = batch["labels"]
        logits_BL = modules[PART](unit_pixels(batch["pixels"]))
        loss = F.cross_entropy(logits_BL, labels_B, label_smoothing=self.config.smoothing)
        accuracy = (logits_BL.detach().argmax(1) == labels_B).float().mean()
        return Losses({"cross_entropy": loss}, {"batch_accuracy": accuracy})

    def evaluate(self) -> dict[str, float]:
        """Accuracy on the held-out images."""
        accuracy = mean_figure(self._is_right, self.judged, self.replicas, rows=self.config.rows_per_pass)
        return {"accuracy": accuracy, "loss": 1 - accuracy}

    def _is_right(self, images_BCHW: Tensor, numbers_B: NDArray[np.int64]) -> Tensor:
        labels_B = torch.from_numpy(self.judged.image_set.labels[numbers_B]).to(images_BCHW.device)
        is_right_B: Tensor = self.network(images_BCHW).argmax(1) == labels_B
        return is_right_B
