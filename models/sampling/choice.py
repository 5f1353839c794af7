"""From logits to a code: filters, and the inverse of the cumulative distribution in code order, in float64.

In a float32 sum over 262,144 codes a third of them could never be drawn: their probability is below its rounding.

B rows, K codes, V logits (K, or more)
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.sampling.config import Filters


def choose(logits_BV: Tensor, uniforms_B: Tensor, filters: Filters, *, codes: int | None = None) -> Tensor:
    """A code per row, (B,) int64, from float32 logits and float64 uniforms in [0, 1).

    codes: K, default V. Later entries are never drawn, but take part in the softmax.
    A row without a finite largest logit gives the invalid code K, which the caller has to check for.
    """
    if filters.greedy:
        largest_B, codes_B = logits_BV[:, :codes].max(-1)
        return torch.where(largest_B.isfinite(), codes_B, codes or logits_BV.shape[-1])
    logits_BV = logits_BV / filters.temperature
    if filters.top_k is not None:
        logits_BV = keep_top_k(logits_BV[:, :codes], filters.top_k)
    probabilities_BK = logits_BV.softmax(-1)[:, :codes]
    if filters.top_p is not None:
        probabilities_BK = keep_top_p(probabilities_BK, filters.top_p)
    return invert(probabilities_BK, uniforms_B)


def keep_top_k(logits_BK: Tensor, k: int) -> Tensor:
    """Set all logits below the k-th largest to -inf; what ties with the k-th stays."""
    smallest_B1 = logits_BK.topk(min(k, logits_BK.shape[-1]), dim=-1).values[:, -1:]
    return logits_BK.masked_fill(logits_BK < smallest_B1, -torch.inf)


def keep_top_p(probabilities_BK: Tensor, p: float) -> Tensor:
    """Zero all but the smallest set of likeliest codes whose sum reaches p; ties go to the lower code."""
    sorted_BK, codes_BK = probabilities_BK.sort(dim=-1, descending=True, stable=True)
    before_BK = sorted_BK.double().cumsum(-1) - sorted_BK
    kept_BK = torch.zeros_like(probabilities_BK, dtype=torch.bool).scatter(1, codes_BK, before_BK < p)
    return probabilities_BK * kept_BK


def invert(probabilities_BK: Tensor, uniforms_B: Tensor) -> Tensor:
    """The first code whose cumulative probability exceeds uniform * total: never one of probability zero.

    A total that is not finite gives K.
    """
    cumulative_BK = probabilities_BK.double().cumsum(-1)
    if cumulative_BK.device.type != "cpu":  # other devices sum blocks of codes, with different rounding
        cumulative_BK = non_decreasing(cumulative_BK, probabilities_BK)
    total_B1 = cumulative_BK[:, -1:].contiguous()
    drawn_B1 = torch.searchsorted(cumulative_BK, uniforms_B.double()[:, None] * total_B1, right=True)
    # Rounding may raise uniform * total to the total itself: then it is the last code with a probability.
    last_B1 = torch.searchsorted(cumulative_BK, total_B1)
    codes_B1 = torch.minimum(drawn_B1, last_B1)
    return torch.where(total_B1.isfinite(), codes_B1, probabilities_BK.shape[-1])[:, 0]


def non_decreasing(cumulative_BK: Tensor, probabilities_BK: Tensor) -> Tensor:
    """Cumulative sums that never fall, and that rise only at codes with a probability above 0."""
    return cumulative_BK.masked_fill(probabilities_BK == 0, 0).cummax(-1).values
