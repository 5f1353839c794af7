"""The entropies of Q = softmax(S / temperature), chunk by chunk, and their gradient.

At a low temperature nearly all of Q underflows to 0. In such a (sparse) chunk only the codes within the underflow window
below the largest logit of each row are computed, found through the maxima of groups of codes. A diffuse chunk
(logits of small spread, or a high temperature) takes the dense form, a few rows at a time: same result in the same memory,
at about half the speed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Shapes: n tokens of one chunk, K codes (in a tile of logits filled up to whole groups), G groups of C codes,
# H pairs (token, group) that reach into the window, W pairs (token, code) within it
GROUP = 64
SPARSE_SHARE = 64  # a chunk is sparse if at most one of so many entries is within the window
EPSILON = 1e-5  # inside the logarithm of the codebook's entropy, as published; not inert at large K


class Peaks(NamedTuple):
    """Maxima of a tile of logits: by group, and by row with its code (the first on ties)."""

    groups_nG: Tensor
    top_n: Tensor
    codes_n: Tensor


def find_peaks(logits_nK: Tensor) -> Peaks:
    grouped_nGC = logits_nK.unflatten(1, (-1, GROUP))
    groups_nG = grouped_nGC.amax(-1)
    best_n = groups_nG.argmax(1)
    rows_n = torch.arange(len(best_n), device=best_n.device)
    within_n = grouped_nGC[rows_n, best_n].argmax(1)
    return Peaks(groups_nG, groups_nG[rows_n, best_n], best_n * GROUP + within_n)


class Slopes(NamedTuple):
    """Factor of log Q in the gradient, and slope of the codebook's entropy along each code."""

    sample: Tensor
    codebook_K: Tensor


def entropy_slopes(mean_K: Tensor, grad_sample: Tensor, grad_codebook: Tensor) -> Slopes:
    """mean_K: of Q over a group.  Both gradients are divided by the temperature and by the tokens of their mean."""
    shifted_K = mean_K + EPSILON
    return Slopes(grad_sample, -grad_codebook * (shifted_K.log() + mean_K / shifted_K))


def codebook_entropy(mean_K: Tensor) -> Tensor:
    return -(mean_K * (mean_K + EPSILON).log()).sum()


class Windowed(NamedTuple):
    """A sparse chunk: its row entropies and the entries of log Q that do not underflow, row by row."""

    entropy_n: Tensor
    rows_W: Tensor
    codes_W: Tensor
    log_q_W: Tensor

    def add_gradient(self, grad_nK: Tensor, slopes: Slopes) -> None:
        """Q_ik (slope_k - sum_j Q_ij slope_j - sample (log Q_ik + entropy_i)), added where it is not 0."""
        q_W, slope_W = self.log_q_W.exp(), slopes.codebook_K[self.codes_W]
        mean_n = torch.zeros_like(self.entropy_n).index_add_(0, self.rows_W, q_W * slope_W)
        constant_n = mean_n + slopes.sample * self.entropy_n
        values_W = q_W * (slope_W - slopes.sample * self.log_q_W - constant_n[self.rows_W])
        grad_nK.index_put_((self.rows_W, self.codes_W), values_W, accumulate=True)


class Diffuse(NamedTuple):
    """A chunk with too many entries within the window: everything is recomputed from the logits."""

    entropy_n: Tensor
    top_n: Tensor
    temperature: float

    def gradient(self, rows: slice, logits_nK: Tensor, slopes: Slopes) -> Tensor:
        """The gradient of `Windowed.add_gradient` for every entry of some rows, whose logits are not overwritten.

        Q is normalised again: these logits come from a product of another shape than in the forward pass, and the
        gradient is a difference that would suffer from a normaliser with other rounding errors.
        """
        scaled_nK = floored((logits_nK - self.top_n[rows, None]).div_(self.temperature))
        log_q_nK = scaled_nK.sub_(scaled_nK.exp().sum(1, keepdim=True).log())
        q_nK = floored(log_q_nK).exp()
        constant_n1 = row_dot(q_nK, slopes.codebook_K - slopes.sample * log_q_nK)
        return log_q_nK.mul_(-slopes.sample).add_(slopes.codebook_K).sub_(constant_n1).mul_(q_nK)


def tempered_softmax(logits_nK: Tensor, peaks: Peaks, temperature: float, mass_K: Tensor) -> Windowed | Diffuse:
    """Q of a chunk, whose column sums are added to `mass_K`. May overwrite the logits."""
    floor_n = peaks.top_n - temperature * underflow(logits_nK.dtype)
    is_hot_nG = peaks.groups_nG > floor_n[:, None]
    if int(is_hot_nG.sum()) * 4 > is_hot_nG.numel():
        return tempered_diffuse(logits_nK, peaks.top_n, temperature, mass_K)
    rows_H, groups_H = is_hot_nG.nonzero(as_tuple=True)
    logits_HC = logits_nK.unflatten(1, (-1, GROUP))[rows_H, groups_H]
    is_inside_HC = logits_HC > floor_n[rows_H, None]
    if int(is_inside_HC.sum()) * SPARSE_SHARE > logits_nK.numel():
        return tempered_diffuse(logits_nK, peaks.top_n, temperature, mass_K)
    pairs_W, within_W = is_inside_HC.nonzero(as_tuple=True)
    rows_W, codes_W = rows_H[pairs_W], groups_H[pairs_W] * GROUP + within_W
    scaled_W = (logits_HC[pairs_W, within_W] - peaks.top_n[rows_W]) / temperature
    sum_n = torch.zeros_like(floor_n).index_add_(0, rows_W, scaled_W.exp())
    log_q_W = scaled_W - sum_n.log()[rows_W]
    q_W = log_q_W.exp()
    mass_K.index_add_(0, codes_W, q_W)
    entropy_n = torch.zeros_like(floor_n).index_add_(0, rows_W, q_W * log_q_W).neg_()
    return Windowed(entropy_n, rows_W, codes_W, log_q_W)


def tempered_diffuse(logits_nK: Tensor, top_n: Tensor, temperature: float, mass_K: Tensor) -> Diffuse:
    scaled_nK = logits_nK[:, : len(mass_K)].sub_(top_n[:, None]).div_(temperature)
    unnormalised_nK = floored(scaled_nK).exp()
    sum_n = unnormalised_nK.sum(1)
    mass_K.addmv_(unnormalised_nK.T, 1 / sum_n)
    entropy_n = sum_n.log() - row_dot(unnormalised_nK, scaled_nK)[:, 0] / sum_n
    return Diffuse(entropy_n, top_n, temperature)


def underflow(dtype: torch.dtype) -> float:
    """Beyond this x, exp(-x) is below the normal numbers and taken as 0: 87 in float32, 708 in float64.

    (Up to 104 or 745 it would be subnormal, which makes no difference to a sum over codes and takes a hundred times as long.)
    """
    return -math.log(torch.finfo(dtype).tiny)


def floored(log_q: Tensor) -> Tensor:
    """In place: clamp, so that exponentials and their products are not subnormal. The change is below rounding."""
    return log_q.clamp_(min=8 - underflow(log_q.dtype))


def row_dot(a_nK: Tensor, b_nK: Tensor) -> Tensor:
    """Dot product of each row, (n, 1), without another tile."""
    return torch.bmm(a_nK[:, None], b_nK[:, :, None])[:, 0]
