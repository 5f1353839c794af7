"""Linear layers, and attention of one position over a cache, for a few rows on one core of the CPU, compiled by numba.

Every weight and every key is read once, in memory order, without dispatch in between.

R streams, J positions of the cache, D width, H heads, E = D / H, I inputs and O outputs of a
linear layer, which are 3 D where it makes queries, keys and values
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

# Sums may be taken in the order that fills vector registers; infinity and NaN keep their meaning.
OPTIONS: Any = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc"}}


def compiled(function: Any) -> Any:
    """`function`, compiled at its first call and cached on disk where a folder can be written."""
    try:
        return njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # numba finds no folder for its cache
        return njit(**OPTIONS)(function)


@compiled
def affine(x_RI, weight_OI, bias_O):
    """x W^T + b, (R, O); four rows per loaded weight."""
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
def attend(qkv_RO, keys_RHJE, values_RHJE, position, scale):
    """Write this position's keys and values; attention of its queries over all positions so far, (R, D)."""
    streams, heads, _, own = keys_RHJE.shape
    width = heads * own
    out_RD = np.empty((streams, width), np.float32)
    for r in range(streams):
        for h in range(heads):
            start, keys_JE, values_JE = h * own, keys_RHJE[r, h], values_RHJE[r, h]
            y_E = out_RD[r, start : start + own]
            keys_JE[position] = qkv_RO[r, width + start : width + start + own]
            values_JE[position] = qkv_RO[r, 2 * width + start : 2 * width + start + own]
            for e in range(own):
                y_E[e] = qkv_RO[r, start + e] * scale
            mean_values(attention_weights(y_E, keys_JE, position + 1), values_JE, y_E)
    return out_RD


@compiled
def attention_weights(q_E, keys_JE, seen):
    """Softmax of a query's products with the first `seen` keys, (seen,); the query is scaled already."""
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
    """Weighted sum of values; four at a time, so that the sum is loaded and stored less often."""
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
