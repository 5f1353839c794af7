"""The two-layer perceptron of transformer blocks."""

from __future__ import annotations

from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, linear; dropout after each of the last two."""

    def __init__(self, width: int, hidden_width: int, *, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)
        self.gelu = nn.GELU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(self.gelu(self.fc1(x)))))
