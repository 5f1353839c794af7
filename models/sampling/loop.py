"""The one sampling loop of all autoregressive generators.

B rows of a pass, R streams (B, or 2B with guidance: the conditional half first), T tokens, D width, K values of a
sub-token
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from models.sampling.choice import choose
from models.sampling.config import SamplingConfig
from models.sampling.heads import Head
from models.sampling.philox import uniforms


class Decoder(Protocol):
    """The interface of a generator to the loop: a static cache that takes a condition and then a code at a time."""

    rows: int
    guided: bool
    tokens: int
    subtokens: tuple[int, ...]
    """Number of values of each sub-token of a code."""
    device: torch.device
    head: Head
    orders_BT: Tensor | None
    """The position in raster order that each step generates; None for raster order."""

    def prefill(self, condition: Tensor | None) -> Tensor:
        """Start a pass. Hidden states (R, D) that the first codes are drawn from."""

    def step(self, codes_B: Tensor) -> Tensor:
        """Append a code to each row. Hidden states (R, D) that the next ones are drawn from."""


@torch.inference_mode()
def sample(
    decoder: Decoder,
    condition: Tensor | None,
    ids_B: Tensor,
    *,
    config: SamplingConfig,
    seed: int,
    stream: int = 0,
) -> Tensor:
    """One pass: codes (B, T) int64 in raster order, on the decoder's device.

    condition: labels (B,) or codes (B, S) of another space, int64, or None.  stream: of random numbers; a sampled
    condition and the samples given it need different ones.

    condition and ids_B (sample ids, which the random numbers are a function of) have exactly `decoder.rows` rows: pad a
    last pass and drop the padding. Raises ValueError where decoder, condition and config do not fit together, and
    FloatingPointError where logits are not finite.
    """
    check_pass(decoder, condition, ids_B, config)
    tokens, counts = decoder.tokens, decoder.subtokens
    ids_B = ids_B.to(decoder.device)
    uniforms_SBT = [
        uniforms(seed, ids_B, steps=tokens, subtoken=number, stream=stream) for number in range(len(counts))
    ]
    weights_ST = [config.weights(number, tokens) for number in range(len(counts))]
    filters_S = [config.filters(number) for number in range(len(counts))]
    is_bad_B = torch.zeros(decoder.rows, dtype=torch.bool, device=decoder.device)

    def draw(subtoken: int, logits_RK: Tensor) -> Tensor:
        nonlocal is_bad_B
        logits_BK = guide(logits_RK, float(weights_ST[subtoken][step])) if decoder.guided else logits_RK
        values_B = choose(logits_BK, uniforms_SBT[subtoken][:, step], filters_S[subtoken], codes=counts[subtoken])
        is_impossible_B = values_B == counts[subtoken]
        is_bad_B = is_bad_B | is_impossible_B
        return values_B.masked_fill(is_impossible_B, 0)

    drawn_BT = torch.empty(decoder.rows, tokens, dtype=torch.int64, device=decoder.device)
    for step in range(tokens):
        hidden_RD = decoder.step(drawn_BT[:, step - 1]) if step else decoder.prefill(condition)
        drawn_BT[:, step] = decoder.head.draw(hidden_RD, draw)
    if is_bad_B.any():
        raise FloatingPointError("the generator's logits are not finite (NaN or infinity)")
    if decoder.orders_BT is None:
        return drawn_BT
    return torch.empty_like(drawn_BT).scatter_(1, decoder.orders_BT, drawn_BT)


def guide(logits_RK: Tensor, weight: float) -> Tensor:
    """Classifier-free guidance of conditional (first half) and unconditional logits (second half): (B, K)."""
    conditional_BK, unconditional_BK = logits_RK.chunk(2)
    return torch.add(unconditional_BK, conditional_BK - unconditional_BK, alpha=weight)


class Pass(Protocol):
    """The properties of a decoder's passes."""

    rows: int
    guided: bool
    subtokens: tuple[int, ...]


def check_pass(decoder: Pass, condition: Tensor | None, ids_B: Tensor, config: SamplingConfig) -> None:
    """ValueError where decoder, condition, sample ids and config do not fit together."""
    config.check(len(decoder.subtokens))
    if decoder.guided != config.guided:
        raise ValueError(f"the decoder has guided={decoder.guided}, but {config.guidance!r} needs {config.guided}")
    given = [len(ids_B)] if condition is None else [len(ids_B), len(condition)]
    if set(given) != {decoder.rows}:
        raise ValueError(f"a pass has {decoder.rows} rows, got {given[0]} sample ids and conditions for {given[-1]}")
