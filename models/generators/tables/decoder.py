"""The decoder of generators whose logits are a table by class and position.

B rows, R streams (B, or 2B with guidance: the conditional half first), T tokens, K codes, C classes
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.generators.step_decoder import StepDecoder
from models.generators.tables.network import TableGenerator
from models.sampling.heads import CodeHead


class TableDecoder(StepDecoder):
    """A step looks up one row of the table per stream: its hidden states are logits, float32 whatever `dtype` says."""

    def __init__(
        self,
        model: TableGenerator,
        *,
        rows: int,
        guided: bool,
        orders: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(model, rows=rows, guided=guided, orders=orders, dtype=dtype)
        self.logits_CTK = model.logits()
        self.head = CodeHead(lambda logits_RK: logits_RK)

    def begin(self, condition: Tensor | None) -> Tensor:
        """Keep the labels."""
        assert condition is not None
        self.labels_R = self.labels_of(condition)
        return self.compute(0)

    def append(self, codes_B: Tensor) -> Tensor:
        """Independent of the codes."""
        return self.compute(self.position)

    def compute(self, position: int, *inputs: Tensor) -> Tensor:
        """Logits (R, K)."""
        if self.orders_BT is None:
            return self.logits_CTK[self.labels_R, position]
        return self.logits_CTK[self.labels_R, self.streams_of(self.orders_BT[:, position])]
