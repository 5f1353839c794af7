"""The health of a codebook: which codes are used, in this batch and lately; shared by all quantizers.

The running use is a buffer, so that a checkpoint has it, and is summed over replicas.
"""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor, nn

from models.metrics import perplexity

# Shapes: N tokens, K codes


class CountsUse(nn.Module):
    """Base of the quantizers: buffers `step` (training steps seen) and `usage_K` (share of tokens, running mean)."""

    step: Tensor
    usage_K: Tensor

    def __init__(self, codes: int, *, decay: float, dead_below: float):
        """`dead_below`: a code is dead if used less than this share of an even use."""
        super().__init__()
        self.codebook_size = codes
        self.decay = decay
        self.dead_below = dead_below
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("usage_K", torch.full((codes,), 1 / codes))

    @torch.no_grad()
    def stats(self, codes_N: Tensor) -> dict[str, Tensor]:
        """Share of codes in this batch, their perplexity, and the share of dead codes."""
        counts_K = torch.bincount(codes_N, minlength=self.codebook_size)
        return {
            "usage": (counts_K > 0).float().mean(),
            "perplexity": perplexity(counts_K),
            "dead": self.little_used().float().mean(),
        }

    def little_used(self) -> Tensor:
        return self.usage_K < self.dead_below / self.codebook_size

    @torch.no_grad()
    def count(self, codes_N: Tensor) -> None:
        """Advance the step and the running use, over all replicas."""
        counts_K = torch.bincount(codes_N, minlength=self.codebook_size).to(self.usage_K.dtype)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts_K)
        self.usage_K.lerp_(counts_K / counts_K.sum(), 1 - self.decay)
        self.step += 1
