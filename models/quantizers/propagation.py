"""The softmax of index backpropagation: exact gradients without a tokens x codes matrix.

With latents Z, codebook E, S = Z E^T and P = softmax(S), forward gives E[argmax S] and backward the gradient of P E;
beside it the two entropies of Q = softmax(S / temperature). Plain code keeps some ten matrices of tokens x codes (2 GiB
each for 2,048 tokens and 262,144 codes). Here both passes go over chunks of rows in a few tiles of bounded size
and recompute S, with gradients in closed form: 10 N K D operations instead of autograd's 16.

What the entropies need is in `tempered.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.quantizers.tempered import (
    GROUP,
    Diffuse,
    Slopes,
    Windowed,
    codebook_entropy,
    entropy_slopes,
    find_peaks,
    row_dot,
    tempered_softmax,
)

# Shapes: N tokens, n tokens of one chunk, D latent channels, K codes
ELEMENTS_PER_TILE = 2**24  # 64 MiB of float32, whatever the number of tokens and codes
ROWS_AT_ONCE = 16  # of a tile, in what is done entry by entry
CPU_ROWS_PER_TILE = 128  # small tiles stay near the cache; fewer rows would slow the matrix products


class Propagated(NamedTuple):
    """z_ND: the chosen rows, with the gradient of P E. The entropies (nats) are 0 if no temperature was given.

    codebook_entropy_G: of the mean of Q over each group of tokens.
    """

    z_ND: Tensor
    codes_N: Tensor
    quantization: Tensor
    sample_entropy: Tensor
    codebook_entropy_G: Tensor


class TokenGroup(NamedTuple):
    """Rows over which the mean of Q is taken.  tokens: of the whole group, which may extend beyond these rows.

    mass_K: the sum of Q over all tokens of a group that does.
    """

    rows: slice
    tokens: int
    mass_K: Tensor | None = None


def propagate(
    z_ND: Tensor,
    codebook_KD: Tensor,
    *,
    beta: float,
    temperature: float | None,
    groups: Sequence[TokenGroup] | None = None,
) -> Propagated:
    """Quantize, with all loss terms unweighted; differentiable once in the latents and in every code.

    groups: cover the rows in their order; by default all rows are one group.

    quantization is (1 + 1 + beta) times the mean squared error; its parts differ in where the gradient goes: the first
    also through P, the second to the latents alone, the third to the chosen codes alone. (beta stands on the third in
    the published code, on the second in the paper.)
    """
    groups = groups or [TokenGroup(slice(0, len(z_ND)), len(z_ND))]
    return Propagated(*_Propagation.apply(z_ND, codebook_KD, beta, temperature, groups))


@torch.no_grad()
def tempered_mass(z_ND: Tensor, codebook_KD: Tensor, temperature: float) -> Tensor:
    """The sum of Q over all tokens, (K,)."""
    mass_K = z_ND.new_zeros(len(codebook_KD))
    for logits_nK in logit_tiles(z_ND, codebook_KD):
        tempered_softmax(logits_nK, find_peaks(logits_nK), temperature, mass_K)
    return mass_K


class _Propagation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z_ND: Tensor,
        codebook_KD: Tensor,
        beta: float,
        temperature: float | None,
        groups: Sequence[TokenGroup],
    ) -> tuple[Any, ...]:
        tops, codes, tempered, means = [], [], [], []
        for group in groups:
            mass_K = z_ND.new_zeros(len(codebook_KD))
            for logits_nK in logit_tiles(z_ND[group.rows], codebook_KD):
                peaks = find_peaks(logits_nK)
                tops.append(peaks.top_n)
                codes.append(peaks.codes_n)
                if temperature is not None:
                    tempered.append(tempered_softmax(logits_nK, peaks, temperature, mass_K))
            means.append((mass_K if group.mass_K is None else group.mass_K) / group.tokens)
        top_N, codes_N, mean_GK = torch.cat(tops), torch.cat(codes), torch.stack(means)
        chosen_ND = codebook_KD[codes_N]
        sample_entropy = torch.cat([part.entropy_n for part in tempered]).mean() if tempered else z_ND.new_zeros(())
        ctx.save_for_backward(z_ND, codebook_KD, codes_N, top_N, mean_GK)
        ctx.beta, ctx.temperature, ctx.groups, ctx.tempered = beta, temperature, groups, tempered
        ctx.mark_non_differentiable(codes_N)
        quantization = (2 + beta) * F.mse_loss(chosen_ND, z_ND)
        entropies_G = torch.stack([codebook_entropy(mean_K) for mean_K in mean_GK])
        return chosen_ND, codes_N, quantization, sample_entropy, entropies_G

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_z_ND: Tensor, _: Tensor, grad_quantization: Tensor, grad_sample: Tensor, grad_codebook_G: Tensor
    ) -> tuple[Tensor | None, ...]:
        z_ND, codebook_KD, codes_N, top_N, mean_GK = ctx.saved_tensors
        pull_ND = (codebook_KD[codes_N] - z_ND) * (2 * grad_quantization / z_ND.numel())
        upstream_ND = grad_z_ND + pull_ND  # the first part of the loss, through P E
        grad_z_ND = -2 * pull_ND  # the direct share of the first part, and the second part
        grad_codebook_KD = torch.zeros_like(codebook_KD)
        tempered = iter(ctx.tempered)
        temperature = ctx.temperature or 1.0
        for group, mean_K, grad_codebook in zip(ctx.groups, mean_GK, grad_codebook_G, strict=True):
            slopes = entropy_slopes(
                mean_K, grad_sample / (len(z_ND) * temperature), grad_codebook / (group.tokens * temperature)
            )
            for rows, logits_nK, slope_nK in paired_tiles(z_ND, upstream_ND, codebook_KD, within=group.rows):
                grad_nK = softmax_gradient(logits_nK, slope_nK, top_N[rows], next(tempered, None), slopes)
                grad_z_ND[rows].addmm_(grad_nK, codebook_KD)
                grad_codebook_KD.addmm_(grad_nK.T, z_ND[rows])
        grad_codebook_KD.index_add_(0, codes_N, upstream_ND.add(pull_ND, alpha=ctx.beta))
        return grad_z_ND, grad_codebook_KD, None, None, None


def softmax_gradient(
    logits_nK: Tensor, slope_nK: Tensor, top_n: Tensor, part: Windowed | Diffuse | None, slopes: Slopes
) -> Tensor:
    """Gradient of the logits, a few rows at a time so that they stay in the cache. Overwrites both tiles.

    Through P E it is P_ik (slope_ik - sum_j P_ij slope_ij); that of the entropies is added.
    """
    for start in range(0, len(logits_nK), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        diffuse_nK = part.gradient(rows, logits_nK[rows], slopes) if isinstance(part, Diffuse) else None
        unnormalised_nK = logits_nK[rows].sub_(top_n[rows, None]).exp_()
        sum_n1 = unnormalised_nK.sum(1, keepdim=True)
        mean_n1 = row_dot(unnormalised_nK, slope_nK[rows]) / sum_n1
        slope_nK[rows].sub_(mean_n1).mul_(unnormalised_nK).div_(sum_n1)
        if diffuse_nK is not None:
            slope_nK[rows] += diffuse_nK
    if isinstance(part, Windowed):
        part.add_gradient(slope_nK, slopes)
    return slope_nK


def logit_tiles(z_ND: Tensor, codebook_KD: Tensor) -> Iterator[Tensor]:
    """S in chunks of rows, each overwriting the one before; columns of -inf fill the last group of codes."""
    codes, rows = len(codebook_KD), tile_rows(z_ND, codebook_KD)
    tile_nK = z_ND.new_empty(min(rows, len(z_ND)), codes + -codes % GROUP)
    for z_nD in z_ND.split(rows):
        torch.mm(z_nD, codebook_KD.T, out=tile_nK[: len(z_nD), :codes])
        tile_nK[:, codes:] = -torch.inf
        yield tile_nK[: len(z_nD)]


def paired_tiles(
    z_ND: Tensor, upstream_ND: Tensor, codebook_KD: Tensor, *, within: slice
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, S and G E^T (the slope along each code) in chunks of the rows `within`; one product for both."""
    rows = tile_rows(z_ND, codebook_KD)
    pair_mK = z_ND.new_empty(2 * min(rows, within.stop - within.start), len(codebook_KD))
    for start in range(within.start, within.stop, rows):
        chunk = slice(start, min(start + rows, within.stop))
        both_mD = torch.cat([z_ND[chunk], upstream_ND[chunk]])
        torch.mm(both_mD, codebook_KD.T, out=pair_mK[: len(both_mD)])
        yield chunk, *pair_mK[: len(both_mD)].chunk(2)


def tile_rows(z_ND: Tensor, codebook_KD: Tensor) -> int:
    rows = max(1, ELEMENTS_PER_TILE // len(codebook_KD))
    return min(rows, CPU_ROWS_PER_TILE) if z_ND.device.type == "cpu" else rows
