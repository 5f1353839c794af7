"""Codes in use after a training, counted over all images (here random bytes, and an encoder that costs nothing)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.large import Measured, Row
from benchmarks.large.synthetic import IMAGES
from pipeline.draft import Draft, Request
from stages.training.codebook import count_codes
from stages.training.replicas import Replicas

CODES, ROWS, SIDE = 2**18, 64, 16


class Images:
    """As many images as there are, of 16 x 16 x 3 random bytes; the encoder takes three bytes for a code."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def upright(self, rows_R: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.random.default_rng(rows_R[0]).integers(0, 256, (len(rows_R), SIDE, SIDE, 3), dtype=np.uint8)


def encode(images_R3hw: torch.Tensor) -> torch.Tensor:
    bytes_R3hw = (images_R3hw * 255).round().long()
    return (bytes_R3hw[:, 0] << 10) + (bytes_R3hw[:, 1] << 2) + (bytes_R3hw[:, 2] >> 6)


def measure(scale: float, folder: Path) -> Iterator[Row]:
    images: Any = Images(round(scale * IMAGES))
    out = Draft.open(folder / "draft", Request("train-tokenizer", "tokenizer", 1, "0" * 64, {}, {}, {}))
    replicas = Replicas(device="cpu", precision="float32")
    with Measured() as taken:
        usage = count_codes(encode, images, replicas, out, codes=CODES, rows=ROWS)
    assert int(usage.counts_K.sum()) == len(images) * SIDE**2
    yield taken.row(f"{CODES:,} codes, without an encoder", f"{len(images):,} images", times=IMAGES / len(images))
