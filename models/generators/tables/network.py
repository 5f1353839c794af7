"""Baselines whose logits are a table: what comes next depends on class and position alone.

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
    """A subclass gives the table."""

    @abstractmethod
    def logits(self) -> Tensor:
        """(C + 1, T, K) float32; the last class stands for none."""

    def loss(
        self, codes_BT: Tensor, condition: Tensor | None, **draws: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Generator`."""
        logits_BTK = self.logits()[condition]
        loss = F.cross_entropy(logits_BTK.flatten(0, 1), codes_BT.flatten())
        return loss, {"correct": (logits_BTK.argmax(-1) == codes_BT).float().mean()}


class Histogram(TableGenerator):
    """The histogram baseline: codes drawn one by one from their class's counts at that position; one that was never seen is never drawn.

    It knows which codes a class shows where, and nothing of how codes go together. On small images that is already enough
    for a judge to name most classes, so a generator has to beat it by a wide margin before it has shown anything.
    """

    counts_CTK: Tensor

    def __init__(self, config: HistogramConfig, shape: CodeShape):
        super().__init__(config, shape)
        self.register_buffer("counts_CTK", torch.zeros(shape.classes, shape.tokens, shape.codes, dtype=torch.int64))

    def fit(self, blocks: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Count codes (N, T) (int64, 0..K-1) of images with labels (N,) 0..C-1, a block of them after the other.

        ValueError for a class that has no image. Beyond the counts it takes memory for one block.
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
            raise ValueError(f"the histogram needs images of every class, and there are none of {unseen[:10]}")

    def _count(self, bins_M: Tensor, first: int, last: int) -> None:
        """Add 1 to each bin, all of classes first to last: many in few classes are counted beside the table, far faster."""
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
    """The worst generator: every code equally likely everywhere. What it scores is the far end of the scale.

    Nothing to learn; the one buffer says on which device it lives.
    """

    zero: Tensor

    def __init__(self, config: UniformConfig, shape: CodeShape):
        super().__init__(config, shape)
        self.register_buffer("zero", torch.zeros(()))

    def fit(self, blocks: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Images say nothing here."""

    def logits(self) -> Tensor:
        """All 0, without memory for them."""
        return self.zero.expand(self.shape.classes + 1, self.shape.tokens, self.shape.codes)
