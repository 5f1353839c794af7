"""Heads, which draw a code from a hidden state.

R streams (B, or 2B with guidance: the conditional half first), D width, K values of a sub-token
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Choose = Callable[[int, Tensor], Tensor]
"""From a sub-token's number and its float32 logits (R, K) to its values (B,): guidance, temperature, filters, draw."""


class Head(Protocol):
    """Draws a code at once, or its sub-tokens one after the other, each given those before it."""

    def draw(self, hidden_RD: Tensor, choose: Choose) -> Tensor:
        """Codes (B,) int64."""


class CodeHead:
    """Draws a code at once, from logits that are a function of the hidden state."""

    def __init__(self, logits: Callable[[Tensor], Tensor]):
        """logits: (R, D) to float32 (R, K)."""
        self.logits = logits

    def draw(self, hidden_RD: Tensor, choose: Choose) -> Tensor:
        """Codes (B,)."""
        return choose(0, self.logits(hidden_RD))
