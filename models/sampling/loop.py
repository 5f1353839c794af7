"""The one sampling loop of all autoregressive generators.

B rows of a pass, R streams (B, or 2B with guidance: the conditional half first), T tokens, K codes
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from models.sampling.choice import choose
from models.sampling.config import SamplingConfig
from models.sampling.philox import uniforms
from models.schedules import power_cosine


class Decoder(Protocol):
    """What a generator shows to the loop: a static cache that takes a condition and then a code at a time."""

    rows: int
    guided: bool
    codes: int
    tokens: int
    device: torch.device
    orders_BT: Tensor  # the image position that each step produces

    def prefill(self, labels_B: Tensor) -> Tensor:
        """Begin a pass. Float32 logits (R, K) of the first code."""

    def step(self, codes_B: Tensor) -> Tensor:
        """Append a code to each row. Float32 logits (R, K) of the next."""


@torch.inference_mode()
def sample(
    decoder: Decoder, labels_B: Tensor, ids_B: Tensor, *, config: SamplingConfig, seed: int, stream: int = 0
) -> Tensor:
    """One pass: codes (B, T) int64 in image order, on the decoder's device.

    stream: of random numbers; samples whose condition was sampled take another one than their condition.

    labels_B and ids_B (sample ids, which the random numbers belong to) have exactly `decoder.rows` rows: pad a last
    pass by any label and drop those rows. Raises ValueError where decoder, labels and config do not belong together,
    and FloatingPointError where logits are not finite.
    """
    _check(decoder, labels_B, ids_B, config)
    weights_T = power_cosine(config.guidance_scale, config.guidance_power, decoder.tokens)
    uniforms_BT = uniforms(seed, ids_B.to(decoder.device), steps=decoder.tokens, stream=stream)
    drawn_BT = torch.empty_like(uniforms_BT, dtype=torch.int64)
    logits_RK = decoder.prefill(labels_B)
    for step in range(decoder.tokens):
        if step > 0:
            logits_RK = decoder.step(drawn_BT[:, step - 1])
        logits_BK = guide(logits_RK, float(weights_T[step])) if decoder.guided else logits_RK
        drawn_BT[:, step] = choose(logits_BK, uniforms_BT[:, step], config)
    if (drawn_BT == decoder.codes).any():
        raise FloatingPointError("the generator's logits are not finite (NaN or infinity)")
    return torch.empty_like(drawn_BT).scatter_(1, decoder.orders_BT, drawn_BT)


def guide(logits_RK: Tensor, weight: float) -> Tensor:
    """Away from the unconditional logits (second half) towards and beyond the conditional ones (first half): (B, K)."""
    conditional_BK, unconditional_BK = logits_RK.chunk(2)
    return torch.add(unconditional_BK, conditional_BK - unconditional_BK, alpha=weight)


def _check(decoder: Decoder, labels_B: Tensor, ids_B: Tensor, config: SamplingConfig) -> None:
    if decoder.guided != config.guided:
        raise ValueError(
            f"the decoder has guided={decoder.guided}, guidance scale {config.guidance_scale} needs {config.guided}"
        )
    if len(labels_B) != decoder.rows or len(ids_B) != decoder.rows:
        raise ValueError(f"a pass has {decoder.rows} rows, got {len(labels_B)} labels and {len(ids_B)} sample ids")
