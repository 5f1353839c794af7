"""One position of RAR for a few rows on one core of the CPU: what `RarStep` computes, compiled by numba.

With a few rows a step lasts about as long as weights and cache take to arrive from memory, and the matrix products of
libraries, made for more rows, take twice that. Here every weight and every key is read once, in the order in which it
lies in memory, and nothing is dispatched in between; `benchmarks/sampling.py` measures it.

R streams, J positions of the cache, D width, H heads, E = D / H, K codes, M = 6 N + 2 modulations of N blocks and the
head, I inputs and O outputs of a linear layer, F hidden width of the MLP
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor, nn

from models.generators.rar.step import query_affine

if TYPE_CHECKING:
    from models.generators.rar.network import Block, Rar

# Sums may be taken in the order that fills vector registers; infinity and NaN keep their meaning.
OPTIONS: Any = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc"}}


def compiled(function: Any) -> Any:
    """`function` compiled at its first call, and kept for the next process where some folder can be written."""
    try:
        return njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # numba finds no folder for its cache
        return njit(**OPTIONS)(function)


class RarCoreStep:
    """The network's own float32 weights, and the keys and values of all positions so far."""

    def __init__(self, model: Rar, *, streams: int):
        width, heads = model.config.width, model.config.heads
        cache = np.zeros((2, len(model.blocks), streams, heads, model.shape.tokens + 1, width // heads), np.float32)
        self.eps = np.float32(model.adaln_before_head.norm.eps)
        self.attentions = [
            (*_attention_weights(block), keys_RHJE, values_RHJE)
            for block, keys_RHJE, values_RHJE in zip(model.blocks, *cache, strict=True)
        ]
        self.mlps = [(_affine_weights(block.mlp.fc1), _affine_weights(block.mlp.fc2)) for block in model.blocks]
        self.head = _affine_weights(model.lm_head)

    def __call__(self, x_RD: Tensor, modulations_RMD: Tensor, position: int) -> Tensor:
        """See `RarStep`."""
        x, modulations = x_RD.numpy().copy(), modulations_RMD.numpy()
        for index, (attention, (fc1, fc2)) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            first = 6 * index
            add_attention(x, modulations, first, *attention, position, self.eps)
            hidden_RF = affine(modulate(x, modulations, first + 3, first + 4, self.eps), *fc1)
            hidden_RF = F.gelu(torch.from_numpy(hidden_RF)).numpy()
            add_gated(x, modulations, first + 5, affine(hidden_RF, *fc2))
        last = modulations.shape[1] - 1
        return torch.from_numpy(modulate(x, modulations, last, last - 1, self.eps))

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Float32 logits (R, K)."""
        return torch.from_numpy(affine(hidden_RD.numpy(), *self.head))


@compiled
def affine(x_RI, weight_OI, bias_O):
    """x W^T + b, (R, O): a weight that was loaded multiplies four rows."""
    rows, inputs = x_RI.shape
    outputs = len(bias_O)
    out_RO = np.empty((rows, outputs), np.float32)
    for o in range(outputs):
        for r in range(0, rows - 3, 4):
            sum0 = sum1 = sum2 = sum3 = np.float32(0)
            for i in range(inputs):
                weight = weight_OI[o, i]
                sum0 += weight * x_RI[r, i]
                sum1 += weight * x_RI[r + 1, i]
                sum2 += weight * x_RI[r + 2, i]
                sum3 += weight * x_RI[r + 3, i]
            out_RO[r, o] = sum0 + bias_O[o]
            out_RO[r + 1, o] = sum1 + bias_O[o]
            out_RO[r + 2, o] = sum2 + bias_O[o]
            out_RO[r + 3, o] = sum3 + bias_O[o]
        for r in range(rows - rows % 4, rows):
            total = np.float32(0)
            for i in range(inputs):
                total += weight_OI[o, i] * x_RI[r, i]
            out_RO[r, o] = total + bias_O[o]
    return out_RO


@compiled
def normalise(x_D, eps, out_D):
    """LayerNorm without affine."""
    width = np.float32(len(x_D))
    total = np.float32(0)
    for d in range(len(x_D)):
        total += x_D[d]
    mean = total / width
    square = np.float32(0)
    for d in range(len(x_D)):
        square += (x_D[d] - mean) * (x_D[d] - mean)
    inverse = np.float32(1) / math.sqrt(square / width + eps)
    for d in range(len(x_D)):
        out_D[d] = (x_D[d] - mean) * inverse


@compiled
def scale_and_shift(x_D, scale_D, shift_D):
    for d in range(len(x_D)):
        x_D[d] = x_D[d] * scale_D[d] + shift_D[d]


@compiled
def modulate(x_RD, modulations_RMD, shift, scale, eps):
    out_RD = np.empty_like(x_RD)
    for r in range(len(x_RD)):
        normalise(x_RD[r], eps, out_RD[r])
        scale_and_shift(out_RD[r], modulations_RMD[r, scale], modulations_RMD[r, shift])
    return out_RD


@compiled
def add_gated(x_RD, modulations_RMD, gate, h_RD):
    for r in range(x_RD.shape[0]):
        for d in range(x_RD.shape[1]):
            x_RD[r, d] += modulations_RMD[r, gate, d] * h_RD[r, d]


@compiled
def add_attention(x_RD, modulations_RMD, first, qkv, proj, query, keys_RHJE, values_RHJE, position, eps):
    """The first half of a block, whose modulations begin at `first`."""
    h_RO = affine(modulate(x_RD, modulations_RMD, first, first + 1, eps), *qkv)
    h_RD = attend(h_RO, query, keys_RHJE, values_RHJE, position, eps)
    add_gated(x_RD, modulations_RMD, first + 2, affine(h_RD, *proj))


@compiled
def attend(qkv_RO, query, keys_RHJE, values_RHJE, position, eps):
    """Write this position's keys and values, and let its queries see all up to here: (R, D)."""
    streams, heads, _, own = keys_RHJE.shape
    width = heads * own
    out_RD = np.empty((streams, width), np.float32)
    for r in range(streams):
        for h in range(heads):
            start, keys_JE, values_JE = h * own, keys_RHJE[r, h], values_RHJE[r, h]
            y_E = out_RD[r, start : start + own]
            q_E, k_E = qkv_RO[r, start : start + own], qkv_RO[r, width + start : width + start + own]
            normalise(q_E, eps, y_E)
            scale_and_shift(y_E, *query)
            normalise(k_E, eps, keys_JE[position])
            values_JE[position] = qkv_RO[r, 2 * width + start : 2 * width + start + own]
            weights_J = likelihoods(y_E, keys_JE, position + 1)
            mean_values(weights_J, values_JE, y_E)
    return out_RD


@compiled
def likelihoods(q_E, keys_JE, seen):
    """The softmax of a query's products with the first `seen` keys, the softmax's scale being part of the query."""
    weights_J = np.empty(seen, np.float32)
    largest = np.float32(-np.inf)
    for j in range(seen):
        product = np.float32(0)
        for e in range(len(q_E)):
            product += q_E[e] * keys_JE[j, e]
        weights_J[j] = product
        largest = max(largest, product)
    total = np.float32(0)
    for j in range(seen):
        weights_J[j] = math.exp(weights_J[j] - largest)
        total += weights_J[j]
    for j in range(seen):
        weights_J[j] /= total
    return weights_J


@compiled
def mean_values(weights_J, values_JE, out_E):
    """Weighted sum of values, four at a time, so that the sum is loaded and stored less often."""
    seen = len(weights_J)
    out_E[:] = 0
    for j in range(0, seen - 3, 4):
        weight0, weight1, weight2, weight3 = weights_J[j], weights_J[j + 1], weights_J[j + 2], weights_J[j + 3]
        for e in range(len(out_E)):
            out_E[e] += (
                weight0 * values_JE[j, e]
                + weight1 * values_JE[j + 1, e]
                + weight2 * values_JE[j + 2, e]
                + weight3 * values_JE[j + 3, e]
            )
    for j in range(seen - seen % 4, seen):
        for e in range(len(out_E)):
            out_E[e] += weights_J[j] * values_JE[j, e]


def _attention_weights(block: Block) -> tuple:
    """qkv, proj, and what is left of the norms' affines: gain and bias of queries."""
    query = tuple(part.detach().float().numpy() for part in query_affine(block.attn))
    return _affine_weights(block.attn.qkv), _affine_weights(block.attn.proj), query


def _affine_weights(linear: nn.Linear) -> tuple:
    """Weight (O, I) and bias (O,)."""
    return tuple(part.detach().float().contiguous().numpy() for part in (linear.weight, linear.bias))
