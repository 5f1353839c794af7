"""The linear probe in batches: some of its steps on rows of 256 codes of 1,024, 1,000 classes (weights of 1 GB)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.large import Measured, Row
from benchmarks.large.synthetic import CLASSES, CODES, TOKENS
from models.logistic import StreamedLogistic
from stages.training.config import ProbeConfig
from stages.training.probe import BATCH, RATE, parts

ROWS = 200_000


def measure(scale: float, folder: Path) -> Iterator[Row]:
    generator, passes = np.random.default_rng(0), ProbeConfig().passes
    steps = max(1, round(scale * passes * ROWS / BATCH))
    model = StreamedLogistic(inputs=TOKENS * CODES, classes=CLASSES, penalty=1 / ROWS, rate=RATE / TOKENS)
    model.weights_FL.fill(0)  # its memory is there before
    with Measured() as taken:
        for _ in range(steps):
            codes_BT = generator.integers(0, CODES, (BATCH, TOKENS))
            model.advance(parts(codes_BT, CODES, None), generator.integers(0, CLASSES, BATCH))
    size = f"{steps * BATCH:,} of {passes} x {ROWS:,} rows"
    yield taken.row("beyond weights of 1,000 MiB", size, times=passes * ROWS / (steps * BATCH))
