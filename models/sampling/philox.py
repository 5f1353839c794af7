"""Philox4x32-10, a counter-based generator (Salmon et al. 2011), in integer tensor operations.

A number is a function of its seed and its counter, with the same bits on every device and in every batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, added to the key after each round
ROUNDS = 10
ORDERS = 2**16 - 1  # stream of the orders in which codes are generated


def uniforms(seed: int, ids_B: Tensor, *, steps: int, subtoken: int = 0, stream: int = 0) -> Tensor:
    """Float64 uniforms in [0, 1), (B, steps): multiples of 2**-53, one per (seed, stream, sample id, step, sub-token).

    seed: 0..2**64-1; ids_B: int64 sample ids, not negative; subtoken, stream: 0..2**16-1. Samples conditioned on
    other samples use another stream than these, so that equal seeds do not correlate them.
    """
    ids_B1 = ids_B.to(torch.int64)[:, None]
    steps_1S = torch.arange(steps, device=ids_B.device)[None]
    counter = (ids_B1 & WORD, ids_B1 >> 32, steps_1S, torch.full_like(steps_1S, stream << 16 | subtoken))
    high_BS, low_BS, _, _ = philox4x32(counter, (seed & WORD, seed >> 32 & WORD))
    return ((high_BS >> 5) << 26 | low_BS >> 6).to(torch.float64) * 2.0**-53


def random_orders(seed: int, ids_B: Tensor, tokens: int) -> Tensor:
    """A uniform random permutation of 0..tokens-1 for each sample id, (B, tokens), from a stream of its own."""
    return uniforms(seed, ids_B, steps=tokens, stream=ORDERS).argsort(dim=1, stable=True)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words, as int64, from a counter of four words (broadcast together) and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit words; by halves, so that int64 never overflows."""
    below = (word & 0xFFFF) * multiplier
    above = (word >> 16) * multiplier + (below >> 16)
    return above >> 16, (above & 0xFFFF) << 16 | below & 0xFFFF
