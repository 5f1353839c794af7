"""The histogram baseline: codes drawn one by one from their class's counts at that position.

It knows which codes a class shows where, and nothing of how codes go together. On small images that is already enough
for a judge to name most classes, so a generator has to beat it by a wide margin before it has shown anything.

N images, T tokens, K codes, C classes
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from models.generators.config import HistogramConfig
from models.generators.table_decoder import TableDecoder

NEVER = -1e30  # logit of a code that was never seen: probability exactly 0, and finite under guidance


class Histogram(nn.Module):
    """Counts of codes per class and position; a code that was never seen there is never drawn."""

    counts_CTK: Tensor

    def __init__(self, config: HistogramConfig, *, codes: int, tokens: int, classes: int):
        super().__init__()
        self.config = config
        self.codes, self.tokens, self.classes = codes, tokens, classes
        self.register_buffer("counts_CTK", torch.zeros(classes, tokens, codes, dtype=torch.int64))

    def fit(self, blocks: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Count codes (N, T) (int64, 0..K-1) of images with labels (N,) 0..C-1, a block of them after the other.

        ValueError for a class that has no image. Beyond the counts it takes memory for one block.
        """
        self.counts_CTK.zero_()
        images_C = torch.zeros(len(self.counts_CTK), dtype=torch.int64)
        for codes_NT, labels_N in blocks:
            places_NT = labels_N[:, None] * self.tokens + torch.arange(self.tokens)
            bins_M = (places_NT * self.codes + codes_NT).flatten()
            self._count(bins_M, int(labels_N.min()), int(labels_N.max()))
            images_C += torch.bincount(labels_N, minlength=len(images_C))
        unseen = (images_C == 0).nonzero().flatten().tolist()
        if unseen:
            raise ValueError(f"the histogram needs images of every class, and there are none of {unseen[:10]}")

    def _count(self, bins_M: Tensor, first: int, last: int) -> None:
        """Add 1 to each bin, all of classes first to last: many in few classes are counted beside the table, far faster."""
        table, bins = self.counts_CTK[first : last + 1].view(-1), bins_M - first * self.tokens * self.codes
        if len(table) <= len(bins):
            table += torch.bincount(bins, minlength=len(table))
        else:
            table.scatter_add_(0, bins, torch.ones_like(bins))

    def decoder(
        self, *, rows: int, guided: bool, orders: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> TableDecoder:
        """A sampler's view of the counts; the logits are float32 whatever `dtype` says."""
        counts_CTK = torch.cat([self.counts_CTK, self.counts_CTK.sum(0, keepdim=True)])
        logits_CTK = counts_CTK.double().log().clamp_min(NEVER).float()
        return TableDecoder(logits_CTK, rows=rows, guided=guided, orders=orders)

    @staticmethod
    def sampling_bytes(
        config: HistogramConfig, *, codes: int, tokens: int, classes: int, rows: int, **asked: Any
    ) -> int:
        """Memory that sampling takes: the counts, the table of logits while it is made, and work per row; numbers are float32 whatever is asked."""
        return 24 * (classes + 1) * tokens * codes + rows * 32 * codes
