"""Causal self-attention with normalised queries and keys.

B rows, T positions, D width, H heads, E width of a head (D / H)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class CausalSelfAttention(nn.Module):
    """Fused qkv, an affine LayerNorm over E on q and on k (shared by the heads), softmax scale 1/sqrt(E)."""

    def __init__(self, width: int, heads: int, *, dropout: float, attention_dropout: float, eps: float):
        super().__init__()
        self.heads = heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads, eps=eps)
        self.k_norm = nn.LayerNorm(width // heads, eps=eps)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BHTE, k_BHTE, v_BHTE = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q_BHTE, k_BHTE = self.q_norm(q_BHTE).to(v_BHTE.dtype), self.k_norm(k_BHTE).to(v_BHTE.dtype)
        rate = self.attention_dropout if self.training else 0.0
        y_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, dropout_p=rate, is_causal=True)
        return self.dropout(self.proj(y_BHTE.transpose(1, 2).flatten(2)))
