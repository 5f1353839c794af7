"""The gated perceptron of Llama-style blocks (arXiv 2002.05202), without biases."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGlu(nn.Module):
    """w2(silu(w1 x) * w3 x), then dropout; the names are those of published files."""

    def __init__(self, width: int, hidden_width: int, *, dropout: float):
        super().__init__()
        self.w1 = nn.Linear(width, hidden_width, bias=False)
        self.w3 = nn.Linear(width, hidden_width, bias=False)
        self.w2 = nn.Linear(hidden_width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))
