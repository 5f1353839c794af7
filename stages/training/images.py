"""Training batches of images: one random view of each, from memory if all views fit, else decoded on the fly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.artifact import Artifact
from pipeline.cores import own_cores
from pipeline.images import ImageSet, ViewPolicy
from pipeline.runtime import Runtime
from pipeline.stage import Inputs
from smalti.counting import counted
from stages.images.passes import to_images
from stages.training.draws import stream
from stages.training.inputs import HELD_OUT
from stages.training.replicas import Replicas
from stages.training.task import Batch

# B rows of a global batch, P rows of this process's share, S pixels per side, N images, V views

CACHE_BYTES = 2**29


class TrainingImages:
    """Images of a set under a view policy. Which view a row gets is drawn by (seed, step, index in the batch)."""

    def __init__(self, artifact: Artifact, *, views: ViewPolicy, seed: int):
        self.image_set = ImageSet.open(artifact.path)
        self.views = views
        self._seed = seed
        self.is_cached = len(self.image_set) * views.count * views.size**2 * 3 <= CACHE_BYTES
        self._views_NVSS3 = self._read_all() if self.is_cached else None

    def __len__(self) -> int:
        return len(self.image_set)

    def batch(self, step: int, rows_B: NDArray[np.int64], share: slice) -> Batch:
        """`pixels` uint8 (P, S, S, 3) and `labels` int64 (P,) of this process's share."""
        views_B = stream(self._seed, "views", step).integers(self.views.count, size=len(rows_B))
        rows_P, views_P = rows_B[share], views_B[share]
        labels_P = self.image_set.labels[rows_P].astype(np.int64)
        return {"pixels": torch.from_numpy(self._pixels(rows_P, views_P)), "labels": torch.from_numpy(labels_P)}

    def upright(self, rows_P: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The upright view of some images, (P, S, S, 3)."""
        return self._pixels(rows_P, np.full(len(rows_P), self.views.upright))

    def _pixels(self, rows_P: NDArray[np.int64], views_P: NDArray[np.int64]) -> NDArray[np.uint8]:
        if self._views_NVSS3 is not None:
            return self._views_NVSS3[rows_P, views_P]
        return self.image_set.chosen_views(rows_P.tolist(), views_P.tolist(), views=self.views, threads=own_cores())

    def _read_all(self) -> NDArray[np.uint8]:
        return self.image_set.all_views(range(len(self)), views=self.views, threads=own_cores())


def mean_figure(
    figure: Callable[[torch.Tensor, NDArray[np.int64]], torch.Tensor],
    images: TrainingImages,
    replicas: Replicas,
    *,
    rows: int,
) -> float:
    """The mean of a figure over the upright views of all images, the same number in every process; each takes passes.

    figure: images in [0,1] (rows, 3, S, S) and their numbers (rows,) to one value per image.
    """
    total = 0.0
    for first in range(replicas.rank * rows, len(images), replicas.world * rows):
        numbers_R = np.minimum(
            np.arange(first, first + rows), len(images) - 1
        )  # a last pass is filled with its last row
        figures_R = figure(to_images(images.upright(numbers_R), replicas.device), numbers_R)
        total += float(figures_R[: len(images) - first].double().sum())
    (mean,) = replicas.mean_of_sums([total], len(images))
    return mean


def open_images(inputs: Inputs, run: Runtime, *, views: ViewPolicy, seed: int) -> tuple[TrainingImages, TrainingImages]:
    """The training images, and those for evaluation: the held-out ones, if they are given."""
    artifacts = [inputs["images"], *inputs.all(HELD_OUT)]
    words = ["image", "held-out image"]
    counts = [counted(artifact.facts["images"], word) for artifact, word in zip(artifacts, words, strict=False)]
    run.progress.say(f"  reading {' and '.join(counts)}, building the networks")
    opened = [TrainingImages(artifact, views=views, seed=seed) for artifact in artifacts]
    return opened[0], opened[-1]
