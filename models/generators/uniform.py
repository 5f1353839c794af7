"""The worst generator: every code equally likely everywhere. What it scores is the far end of the scale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from models.generators.config import UniformConfig
from models.generators.table_decoder import TableDecoder


class Uniform(nn.Module):
    """Nothing to learn; the one buffer says on which device it lives."""

    zero: Tensor

    def __init__(self, config: UniformConfig, *, codes: int, tokens: int, classes: int):
        super().__init__()
        self.config = config
        self.codes, self.tokens, self.classes = codes, tokens, classes
        self.register_buffer("zero", torch.zeros(()))

    def fit(self, blocks: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Images say nothing here."""

    def decoder(
        self, *, rows: int, guided: bool, orders: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> TableDecoder:
        """A sampler's view: all logits 0, without memory for them."""
        logits_CTK = self.zero.expand(self.classes + 1, self.tokens, self.codes)
        return TableDecoder(logits_CTK, rows=rows, guided=guided, orders=orders)

    @staticmethod
    def sampling_bytes(config: UniformConfig, *, codes: int, tokens: int, classes: int, rows: int, **asked: Any) -> int:
        """Memory that sampling takes: work per row alone; numbers are float32 whatever is asked."""
        return rows * 32 * codes
