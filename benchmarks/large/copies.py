"""50,000 samples looked up among the rows of a training set: memory is that of the samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.large import Measured, Row
from benchmarks.large.synthetic import CODES, IMAGES, TOKENS, token_set
from stages.scoring.figures import copies
from stages.scoring.score import blocks_of

SAMPLES, COPIED = 50_000, 100


def measure(scale: float, folder: Path) -> Iterator[Row]:
    training = token_set(folder, scale)
    samples_NT = np.random.default_rng(1).integers(0, CODES, (SAMPLES, TOKENS), dtype=np.uint16)
    samples_NT[:COPIED] = training.codes_of(np.linspace(0, len(training) - 1, COPIED, dtype=np.int64))
    with Measured() as taken:
        share = copies(samples_NT, blocks_of(training))
    assert round(share * SAMPLES) == COPIED
    yield taken.row(f"{SAMPLES:,} samples", f"{len(training):,} rows", times=IMAGES / training.n_images)
