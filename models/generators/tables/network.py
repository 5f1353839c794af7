"""Baselines whose logits are a table by class and position.

N images, B rows, T tokens, K codes, C classes
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.generators.config import CodeShape, HistogramConfig, UniformConfig
from models.generators.generator import Generator

NEVER = -1e30  # logit of a code that was never seen: probability exactly 0, and finite under guidance


class TableGenerator(Generator):
    """A subclass defines the table."""

    @abstractmethod
    def logits(self) -> Tensor:
        """(C + 1, T, K) float32; the last row stands for no class."""

    def loss(
        self, codes_BT: Tensor, condition: Tensor | None, **draws: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Generator`."""
        logits_BTK = self.logits()[condition]
        loss = F.cross_entropy(logits_BTK.flatten(0, 1), codes_BT.flatten())
        return loss, {"correct": (logits_BTK.argmax(-1) == codes_BT).float().mean()}


class Histogram(TableGenerator):
    """The histogram baseline: each code is drawn from its class's counts at that position, independently of the others.

    A code that was never seen there has probability 0. On small images these samples are enough for a classifier to recognise
    most classes, so a generator that models dependencies has to beat it by a wide margin.
    """

    counts_CTK: Tensor

    def __init__(self, config: HistogramConfig, shape: CodeShape):
        super().__init__(config, shape)
        self.register_buffer("counts_CTK", torch.zeros(shape.classes, shape.tokens, shape.codes, dtype=torch.int64))

    def fit(self, blocks: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Count codes (N, T) (int64, 0..K-1) of images with labels (N,) 0..C-1, block by block.

        ValueError for a class that has no image. Beside the counts it takes memory for one block.
        """
        self.counts_CTK.zero_()
        images_C = torch.zeros(len(self.counts_CTK), dtype=torch.int64)
        for codes_NT, labels_N in blocks:
            places_NT = labels_N[:, None] * self.shape.tokens + torch.arange(self.shape.tokens)
            bins_M = (places_NT * self.shape.codes + codes_NT).flatten()
            self._count(bins_M, int(labels_N.min()), int(labels_N.max()))
            images_C += torch.bincount(labels_N, minlength=len(images_C))
        unseen = (images_C == 0).nonzero().flatten().tolist()
        if unseen:
            raise ValueError(f"the histogram needs images of every class, but there are none of classes {unseen[:10]}")

    def _count(self, bins_M: Tensor, first: int, last: int) -> None:
        """Add 1 to each bin, all of classes first to last; by bincount, which is far faster, unless the table is larger."""
        table, bins = self.counts_CTK[first : last + 1].view(-1), bins_M - first * self.shape.tokens * self.shape.codes
        if len(table) <= len(bins):
            table += torch.bincount(bins, minlength=len(table))
        else:
            table.scatter_add_(0, bins, torch.ones_like(bins))

    def logits(self) -> Tensor:
        """Logarithms of the counts."""
        counts_CTK = torch.cat([self.counts_CTK, self.counts_CTK.sum(0, keepdim=True)])
        return counts_CTK.double().log().clamp_min(NEVER).float()


class Uniform(TableGenerator):
    """The uniform baseline: every code is equally likely. Its scores are a lower bound.

    It has no parameters; the buffer carries the device.
    """

    zero: Tensor

    def __init__(self, config: UniformConfig, shape: CodeShape):
        super().__init__(config, shape)
        self.register_buffer("zero", torch.zeros(()))

    def fit(self, blocks: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Nothing to learn."""

    def logits(self) -> Tensor:
        """All 0, expanded without allocation."""
        return self.zero.expand(self.shape.classes + 1, self.shape.tokens, self.shape.codes)
