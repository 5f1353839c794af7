"""The sampling loop of masked generators: all codes are masked at first; each iteration draws all masked codes and masks the
least likely ones again (MaskGIT, arXiv 2202.04200).

B rows, T tokens, K codes, V logits: of codes, then of specials, which are never drawn
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from models.generators.masks import LARGEST_PIECE, masked_after
from models.sampling.choice import choose
from models.sampling.config import Filters, SamplingConfig
from models.sampling.loop import check_pass
from models.sampling.philox import uniforms


class MaskedDecoder(Protocol):
    """The interface of a generator to the loop."""

    rows: int
    guided: bool
    tokens: int
    subtokens: tuple[int, ...]
    """The number of codes alone."""
    device: torch.device

    def logits(self, codes_BT: Tensor, masks_BT: Tensor, condition: Tensor | None) -> Tensor:
        """Float32 logits (B, T, V) of all codes, given those that are not masked."""


@torch.inference_mode()
def sample_masks(
    decoder: MaskedDecoder,
    condition: Tensor | None,
    ids_B: Tensor,
    *,
    config: SamplingConfig,
    seed: int,
    stream: int = 0,
) -> Tensor:
    """One pass: codes (B, T) int64 in raster order, on the decoder's device. See `models.sampling.loop.sample`.

    Random numbers are functions of (seed, stream, sample id, iteration, position).
    """
    check_pass(decoder, condition, ids_B, config)
    (values,) = decoder.subtokens
    ids_B = ids_B.to(decoder.device)
    condition = None if condition is None else condition.to(decoder.device)
    codes_BT = torch.zeros(decoder.rows, decoder.tokens, dtype=torch.int64, device=decoder.device)
    masks_BT = torch.ones_like(codes_BT, dtype=torch.bool)
    counts = masked_after(config.iterations, decoder.tokens)
    for iteration, count in enumerate(counts):
        draws_BT, noise_BT = (
            uniforms(seed, ids_B, steps=decoder.tokens, subtoken=2 * iteration + which, stream=stream)
            for which in range(2)
        )
        logits_BTV = decoder.logits(codes_BT, masks_BT, condition)
        drawn_BT, log_probabilities_BT = _draw(logits_BTV, draws_BT, config.filters(0), values)
        if (drawn_BT[masks_BT] == values).any():
            raise FloatingPointError("the generator's logits are not finite (NaN or infinity)")
        codes_BT = torch.where(masks_BT, drawn_BT, codes_BT)
        if count:
            temperature = 0.0 if config.greedy else config.noise * (1 - (iteration + 1) / len(counts))
            confidence_BT = log_probabilities_BT + temperature * gumbel(noise_BT)
            masks_BT = least(confidence_BT.masked_fill(~masks_BT, torch.inf), count)
    return codes_BT


def _draw(logits_BTV: Tensor, uniforms_BT: Tensor, filters: Filters, codes: int) -> tuple[Tensor, Tensor]:
    """Codes of all positions and the logarithms of their probabilities, in pieces of rows."""
    _, tokens, values = logits_BTV.shape
    rows = max(1, LARGEST_PIECE // (tokens * values))
    drawn, log_probabilities = [], []
    for logits, uniform in zip(logits_BTV.split(rows), uniforms_BT.split(rows), strict=True):
        codes_M = choose(logits.flatten(0, 1), uniform.flatten(), filters, codes=codes)
        # Over codes only: specials have no probability.
        log_MK = logits.flatten(0, 1)[:, :codes].log_softmax(-1)
        log_probabilities.append(log_MK.gather(1, codes_M.clamp_max(codes - 1)[:, None]).view_as(uniform))
        drawn.append(codes_M.view_as(uniform))
    return torch.cat(drawn), torch.cat(log_probabilities)


def gumbel(uniforms: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, from float64 uniforms in [0, 1); finite for all of them."""
    return -(-(uniforms + 2.0**-54).log()).log().float()


def least(confidence_BT: Tensor, count: int) -> Tensor:
    """True where confidence is one of a row's `count` lowest, or equal to the highest of these."""
    return confidence_BT <= confidence_BT.kthvalue(count, dim=1, keepdim=True).values
