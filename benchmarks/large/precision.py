"""Precision and recall of 50,000 images against 10,000, by 2,048 features; and the moments of the Frechet distance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks.large import Measured, Row
from stages.scoring.features import Moments, join
from stages.scoring.neighbours import precision_and_recall

OURS, THEIRS, FEATURES = 50_000, 10_000, 2048


def measure(scale: float, folder: Path) -> Iterator[Row]:
    generator = np.random.default_rng(0)
    sizes = [max(FEATURES, round(scale * count)) for count in (OURS, THEIRS)]
    ours_NE, theirs_ME = (generator.standard_normal((count, FEATURES), np.float32) for count in sizes)
    torch.set_num_threads(1)
    size = " against ".join(f"{count:,}" for count in sizes)
    with threadpool_limits(1):
        with Measured() as taken:
            precision_and_recall(ours_NE, theirs_ME, neighbours=3)
        yield taken.row("precision and recall", size, times=pairs(OURS, THEIRS) / pairs(*sizes))
        with Measured() as taken:
            join(Moments.of(ours_NE[start : start + 1024]) for start in range(0, len(ours_NE), 1024))
        yield taken.row("mean and covariance", f"{sizes[0]:,}", times=OURS / sizes[0])


def pairs(ours: int, theirs: int) -> float:
    """Pairs of rows whose distance is made: half of those within a set, and all between both."""
    return ours**2 / 2 + theirs**2 / 2 + ours * theirs
