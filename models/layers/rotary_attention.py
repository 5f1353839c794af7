"""Causal self-attention whose queries and keys are rotated by position, without biases.

B rows, J positions, D width, H heads, E width of a head (D / H), F = E / 2
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.rope import rotate


class RotaryAttention(nn.Module):
    """Fused query, key and value, softmax scale 1/sqrt(E), dropout after the last product."""

    def __init__(self, width: int, heads: int, *, dropout: float):
        super().__init__()
        self.heads = heads
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BJD: Tensor, rope_JF2: Tensor) -> Tensor:
        q_BJHE, k_BJHE, v_BJHE = self.wqkv(x_BJD).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q_BJHE, k_BJHE = (rotate(part, rope_JF2).to(v_BJHE.dtype) for part in (q_BJHE, k_BJHE))
        q_BHJE, k_BHJE, v_BHJE = (part.transpose(1, 2) for part in (q_BJHE, k_BJHE, v_BJHE))
        y_BHJE = F.scaled_dot_product_attention(q_BHJE, k_BHJE, v_BHJE, is_causal=True)
        return self.dropout(self.wo(y_BHJE.transpose(1, 2).flatten(2)))
