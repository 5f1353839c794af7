"""The decoder of generators whose logits are a table: what comes next depends on class and position alone.

B rows, R streams (B, or 2B with guidance: the conditional half first), T tokens, K codes, C classes
"""

from __future__ import annotations

import torch
from torch import Tensor


class TableDecoder:
    """Passes of `rows` samples for the sampling loop; a step looks up one row of the table per stream."""

    def __init__(self, logits_CTK: Tensor, *, rows: int, guided: bool, orders: Tensor | None):
        """logits_CTK: float32, with one class more than labels, the last standing for no class.

        orders: (T,) for all rows or (rows, T) one each, default raster.
        """
        self.logits_CTK = logits_CTK
        self.device = logits_CTK.device
        self.rows, self.guided = rows, guided
        self.classes, self.tokens, self.codes = logits_CTK.shape[0] - 1, *logits_CTK.shape[1:]
        raster_T = torch.arange(self.tokens, device=self.device)
        self.orders_BT = (raster_T if orders is None else orders.to(self.device)).expand(rows, -1)

    def prefill(self, labels_B: Tensor) -> Tensor:
        """Start a pass for these labels. Returns logits (R, K) of the first code."""
        labels_B = labels_B.to(self.device)
        self.labels_R = torch.cat([labels_B, torch.full_like(labels_B, self.classes)]) if self.guided else labels_B
        self.position = 0
        return self._logits()

    def step(self, codes_B: Tensor) -> Tensor:
        """Returns logits (R, K) of the next code, whatever the last one was."""
        self.position += 1
        return self._logits()

    def _logits(self) -> Tensor:
        places_B = self.orders_BT[:, self.position]
        return self.logits_CTK[self.labels_R, torch.cat([places_B, places_B]) if self.guided else places_B]
