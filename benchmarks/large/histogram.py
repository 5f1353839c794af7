"""The histogram baseline, counted over a training set: memory beyond its counts (2 GB) is that of a block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.large import Measured, Row
from benchmarks.large.synthetic import CLASSES, CODES, IMAGES, TOKENS, token_set
from models.generators.config import CodeShape, HistogramConfig
from models.generators.tables.network import Histogram
from stages.training.tokens import TrainingTokens


def measure(scale: float, folder: Path) -> Iterator[Row]:
    artifact: Any = SimpleNamespace(path=token_set(folder, scale).path, name="tokens")
    tokens = TrainingTokens([artifact], like=artifact)
    network = Histogram(HistogramConfig(), CodeShape(codes=CODES, grid=(TOKENS, 1), classes=CLASSES))
    network.counts_CTK.fill_(1)  # its memory is there before
    with Measured() as taken:
        network.fit((torch.from_numpy(codes_RT), torch.from_numpy(labels_R)) for codes_RT, labels_R in tokens.blocks())
    assert int(network.counts_CTK.sum()) == len(tokens) * TOKENS
    yield taken.row("counts of 1,000 classes", f"{len(tokens):,} rows", times=IMAGES / tokens.images)
