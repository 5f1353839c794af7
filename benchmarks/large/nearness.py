"""Nearness of 50,000 samples and 10,000 real images to training images of 256 pixels: some of the shards, in full size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.large import Measured, Row
from benchmarks.large.synthetic import IMAGES
from stages.scoring.neighbours import SIDE, nearest, thumbnails

QUERIES, SHARD, PASS, PIXELS = 60_000, 1024, 64, 256


def measure(scale: float, folder: Path) -> Iterator[Row]:
    generator = np.random.default_rng(0)
    shards = max(1, round(scale * IMAGES / SHARD))
    torch.set_num_threads(1)
    with Measured() as taken:
        queries_QP = generator.integers(0, 256, (QUERIES, 3 * SIDE**2), dtype=np.uint8)
        for _ in range(shards):
            passes = (
                generator.integers(0, 256, (PASS, PIXELS, PIXELS, 3), dtype=np.uint8) for _ in range(SHARD // PASS)
            )
            nearest(queries_QP, np.concatenate([*map(thumbnails, passes)]), device=torch.device("cpu"))
    seen = shards * SHARD
    yield taken.row(f"{QUERIES:,} images, one thread", f"{seen:,} training images", times=IMAGES / seen)
