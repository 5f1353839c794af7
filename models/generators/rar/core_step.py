"""One position of RAR for a few rows on one core of the CPU: what `RarStep` computes, compiled by numba.

With a few rows a step is bound by memory bandwidth, and the matrix products of libraries, made for more rows, take twice
as long as reading weights and cache. Here every weight and every key is read once, in memory order, without dispatch in
between; `benchmarks/sampling.py` measures it.

R streams, J positions of the cache, D width, H heads, E = D / H, K codes, M = 6 N + 2 modulations of N blocks and the
head, I inputs and O outputs of a linear layer, F hidden width of the MLP
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.generators.core_kernels import affine, attention_weights, compiled, mean_values
from models.generators.rar.network import Block, Rar
from models.generators.rar.step import query_affine


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
    """Write this position's keys and values; attention of its queries over all positions so far, (R, D)."""
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
            weights_J = attention_weights(y_E, keys_JE, position + 1)
            mean_values(weights_J, values_JE, y_E)
    return out_RD


def _attention_weights(block: Block) -> tuple:
    """qkv, proj, and gain and bias of the queries (see `query_affine`)."""
    query = tuple(part.detach().float().numpy() for part in query_affine(block.attn))
    return _affine_weights(block.attn.qkv), _affine_weights(block.attn.proj), query


def _affine_weights(linear: nn.Linear) -> tuple:
    """Weight (O, I) and bias (O,)."""
    return tuple(part.detach().float().contiguous().numpy() for part in (linear.weight, linear.bias))
