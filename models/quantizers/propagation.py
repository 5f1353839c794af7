"""The softmax at the heart of index backpropagation: exact gradients without a tokens x codes matrix.

With latents Z, codebook E, S = Z E^T and P = softmax(S), forward gives E[argmax S] and backward the gradient of P E;
beside it the two entropies of Q = softmax(S / temperature). Plain code keeps some ten matrices of tokens x codes (2 GiB
each for 2,048 tokens and 262,144 codes). Here both directions go over chunks of rows in a few tiles of bounded size
and compute S anew, with gradients in closed form: 10 N K D operations where autograd spends 16.

At a low temperature nearly all of Q underflows to exactly 0. A chunk in which that holds touches only the codes within
the underflow window of each row. A diffuse chunk (logits of small spread, or a high temperature) takes the dense form
in one or two more tiles: same result, same bound on memory, only slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Shapes: N tokens, n tokens of one chunk, D latent channels, K codes, W pairs (token, code) within the window
ELEMENTS_PER_TILE = 2**24  # 64 MiB of float32, whatever the number of tokens and codes
CPU_ROWS_PER_TILE = 64  # a small tile stays in the cache
SPARSE_SHARE = 64  # a chunk is sparse if at most one of so many entries is within the window
EPSILON = 1e-5  # inside the logarithm of the codebook's entropy, as published; not inert at large K


class Propagated(NamedTuple):
    """z_ND: the chosen rows, with the gradient of P E. Both entropies (nats) are 0 if no temperature was given."""

    z_ND: Tensor
    codes_N: Tensor
    quantization: Tensor
    sample_entropy: Tensor
    codebook_entropy: Tensor


def propagate(z_ND: Tensor, codebook_KD: Tensor, *, beta: float, temperature: float | None) -> Propagated:
    """Quantize, with all loss terms unweighted; differentiable once in the latents and in every code.

    quantization is (1 + 1 + beta) times the mean squared error; its parts differ in where the gradient goes: the first
    also through P, the second to the latents alone, the third to the chosen codes alone. (beta stands on the third in
    the published code, on the second in the paper.)
    """
    return Propagated(*_Propagation.apply(z_ND, codebook_KD, beta, temperature))


class _Propagation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_ND: Tensor, codebook_KD: Tensor, beta: float, temperature: float | None) -> tuple[Any, ...]:
        codes_N = torch.empty(len(z_ND), dtype=torch.int64, device=z_ND.device)
        top_N, mass_K = z_ND.new_empty(len(z_ND)), z_ND.new_zeros(len(codebook_KD))
        tempered: list[Tempered] = []
        for rows, logits_nK in logit_tiles(z_ND, codebook_KD):
            torch.max(logits_nK, dim=1, out=(top_N[rows], codes_N[rows]))
            if temperature is not None:
                tempered.append(temper(logits_nK, top_N[rows], temperature, mass_K))
        chosen_ND, mass_K = codebook_KD[codes_N], mass_K / len(z_ND)
        sample_entropy = torch.cat([part.entropy_n for part in tempered]).mean() if tempered else z_ND.new_zeros(())
        codebook_entropy = -(mass_K * (mass_K + EPSILON).log()).sum()
        ctx.save_for_backward(z_ND, codebook_KD, codes_N, top_N, mass_K)
        ctx.beta, ctx.temperature, ctx.tempered = beta, temperature, tempered
        ctx.mark_non_differentiable(codes_N)
        return chosen_ND, codes_N, (2 + beta) * F.mse_loss(chosen_ND, z_ND), sample_entropy, codebook_entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_z_ND: Tensor, _: Tensor, grad_quantization: Tensor, grad_sample: Tensor, grad_codebook: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        z_ND, codebook_KD, codes_N, top_N, mass_K = ctx.saved_tensors
        pull_ND = (codebook_KD[codes_N] - z_ND) * (2 * grad_quantization / z_ND.numel())
        upstream_ND = grad_z_ND + pull_ND  # the first part of the loss sees what the decoder sees
        grad_z_ND = -2 * pull_ND  # the direct share of the first part, and the second part
        grad_codebook_KD = torch.zeros_like(codebook_KD)
        grad_codebook_KD.index_add_(0, codes_N, upstream_ND.add(pull_ND, alpha=ctx.beta))
        slopes = entropy_slopes(mass_K, grad_sample, grad_codebook, scale=1 / (len(z_ND) * (ctx.temperature or 1.0)))
        for index, (rows, logits_nK) in enumerate(logit_tiles(z_ND, codebook_KD)):
            part = ctx.tempered[index] if ctx.tempered else None
            diffuse_nK = None
            if part is not None and part.window is None:
                diffuse_nK = diffuse_gradient(logits_nK, top_N[rows], part, slopes, ctx.temperature)
            grad_nK = softmax_gradient(logits_nK, top_N[rows], upstream_ND[rows], codebook_KD)
            if diffuse_nK is not None:
                grad_nK += diffuse_nK
            elif part is not None:
                add_window_gradient(grad_nK, part, slopes)
            grad_z_ND[rows].addmm_(grad_nK, codebook_KD)
            grad_codebook_KD.addmm_(grad_nK.T, z_ND[rows])
        return grad_z_ND, grad_codebook_KD, None, None


def logit_tiles(z_ND: Tensor, codebook_KD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """S in chunks of rows; each overwrites the one before."""
    rows = max(1, ELEMENTS_PER_TILE // len(codebook_KD))
    if z_ND.device.type == "cpu":
        rows = min(rows, CPU_ROWS_PER_TILE)
    tile_nK = z_ND.new_empty(min(rows, len(z_ND)), len(codebook_KD))
    for start in range(0, len(z_ND), rows):
        chunk = slice(start, min(start + rows, len(z_ND)))
        yield chunk, torch.mm(z_ND[chunk], codebook_KD.T, out=tile_nK[: chunk.stop - start])


def softmax_gradient(logits_nK: Tensor, top_n: Tensor, upstream_nD: Tensor, codebook_KD: Tensor) -> Tensor:
    """Gradient of the logits through P E: P_ik (G_i.E_k - sum_j P_ij G_i.E_j). Overwrites the logits."""
    unnormalised_nK = logits_nK.sub_(top_n[:, None]).exp_()
    shares_n1 = 1 / unnormalised_nK.sum(1, keepdim=True)
    slope_nK = (upstream_nD * shares_n1) @ codebook_KD.T
    mean_n1 = row_dot(unnormalised_nK, slope_nK) * shares_n1
    return slope_nK.sub_(mean_n1).mul_(unnormalised_nK)


class Tempered(NamedTuple):
    """Q of one chunk: its row entropies, log of the row sums of exp((S - top) / temperature), and the window.

    window: rows_W, codes_W and log Q of all entries that do not underflow; None for a diffuse chunk.
    """

    entropy_n: Tensor
    log_sum_n: Tensor
    window: tuple[Tensor, Tensor, Tensor] | None


def temper(logits_nK: Tensor, top_n: Tensor, temperature: float, mass_K: Tensor) -> Tempered:
    """Q of a chunk, whose column sums are added to `mass_K`. May overwrite the logits."""
    in_window_nK = logits_nK > (top_n - temperature * underflow(logits_nK.dtype))[:, None]
    if int(in_window_nK.sum()) * SPARSE_SHARE > in_window_nK.numel():
        return temper_diffuse(logits_nK, top_n, temperature, mass_K)
    rows_W, codes_W = in_window_nK.nonzero(as_tuple=True)
    scaled_W = (logits_nK[rows_W, codes_W] - top_n[rows_W]) / temperature
    log_sum_n = torch.zeros_like(top_n).index_add_(0, rows_W, scaled_W.exp()).log_()
    log_q_W = scaled_W - log_sum_n[rows_W]
    q_W = log_q_W.exp()
    mass_K.index_add_(0, codes_W, q_W)
    entropy_n = torch.zeros_like(top_n).index_add_(0, rows_W, q_W * log_q_W).neg_()
    return Tempered(entropy_n, log_sum_n, (rows_W, codes_W, log_q_W))


def temper_diffuse(logits_nK: Tensor, top_n: Tensor, temperature: float, mass_K: Tensor) -> Tempered:
    scaled_nK = logits_nK.sub_(top_n[:, None]).div_(temperature)
    unnormalised_nK = scaled_nK.exp()
    sum_n = unnormalised_nK.sum(1)
    mass_K.addmv_(unnormalised_nK.T, 1 / sum_n)
    entropy_n = sum_n.log() - row_dot(unnormalised_nK, scaled_nK)[:, 0] / sum_n
    return Tempered(entropy_n, sum_n.log(), None)


def underflow(dtype: torch.dtype) -> float:
    """exp(-x) is exactly 0 beyond this x: 104 in float32, 745 in float64."""
    info = torch.finfo(dtype)
    return 1 - math.log(info.tiny) - math.log(info.eps)


class Slopes(NamedTuple):
    """What the entropies' gradient needs: by how much log Q counts, and the slope of the codebook's entropy in Q."""

    sample: Tensor
    codebook_K: Tensor


def entropy_slopes(mass_K: Tensor, grad_sample: Tensor, grad_codebook: Tensor, *, scale: float) -> Slopes:
    shifted_K = mass_K + EPSILON
    return Slopes(scale * grad_sample, -scale * grad_codebook * (shifted_K.log() + mass_K / shifted_K))


def add_window_gradient(grad_nK: Tensor, part: Tempered, slopes: Slopes) -> None:
    """Q_ik (slope_k - sum_j Q_ij slope_j - sample (log Q_ik + entropy_i)), added where Q is not 0."""
    assert part.window is not None
    rows_W, codes_W, log_q_W = part.window
    q_W, slope_W = log_q_W.exp(), slopes.codebook_K[codes_W]
    mean_n = torch.zeros_like(part.entropy_n).index_add_(0, rows_W, q_W * slope_W)
    constant_n = mean_n + slopes.sample * part.entropy_n
    gradient_W = q_W * (slope_W - slopes.sample * log_q_W - constant_n[rows_W])
    grad_nK.view(-1).index_add_(0, rows_W * grad_nK.shape[1] + codes_W, gradient_W)


def diffuse_gradient(logits_nK: Tensor, top_n: Tensor, part: Tempered, slopes: Slopes, temperature: float) -> Tensor:
    """The same for every entry; keeps the logits."""
    log_q_nK = (logits_nK - top_n[:, None]).div_(temperature).sub_(part.log_sum_n[:, None])
    q_nK = log_q_nK.exp()
    constant_n = q_nK @ slopes.codebook_K + slopes.sample * part.entropy_n
    return log_q_nK.mul_(-slopes.sample).add_(slopes.codebook_K).sub_(constant_n[:, None]).mul_(q_nK)


def row_dot(a_nK: Tensor, b_nK: Tensor) -> Tensor:
    """(n, 1), without a third tile."""
    return torch.bmm(a_nK[:, None], b_nK[:, :, None])[:, 0]
