"""The running use of the codes of a codebook, a buffer that is summed over processes."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor

from models.quantizers.quantizer import Quantizer

# Shapes: N tokens, K codes


class CountsUse(Quantizer):
    """A quantizer that keeps buffers `step` (training steps seen) and `usage_K` (share of tokens, running mean)."""

    step: Tensor
    usage_K: Tensor

    def __init__(self, codes: int, *, decay: float, dead_below: float):
        """`dead_below`: a code is dead if used less than this share of an even use."""
        super().__init__(codes)
        self.decay = decay
        self.dead_below = dead_below
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("usage_K", torch.full((codes,), 1 / codes))

    @torch.no_grad()
    def stats(self, codes_N: Tensor) -> dict[str, Tensor]:
        """Also the share of dead codes."""
        return super().stats(codes_N) | {"dead": self.little_used().float().mean()}

    def little_used(self) -> Tensor:
        return self.usage_K < self.dead_below / self.codebook_size

    @torch.no_grad()
    def count(self, codes_N: Tensor) -> None:
        """Count the codes of a piece; with the last piece update the step and the running use, over all processes."""
        counts_K = torch.bincount(codes_N, minlength=self.codebook_size).to(self.usage_K.dtype)
        self._counts_K = counts_K + self._counts_K if self.part.piece else counts_K  # of this step so far
        if not self.part.is_last:
            return
        if self.part.world > 1:
            torch.distributed.all_reduce(self._counts_K)
        self.usage_K.lerp_(self._counts_K / self._counts_K.sum(), 1 - self.decay)
        self.step += 1
