"""Schedules as functions of the 0-based step; no torch."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

PLATEAU = 0.05


def cosine_between(first: float, last: float, share: float) -> float:
    """Half a cosine from `first` at share 0 to `last` at share 1 and beyond."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def warmup_cosine(
    step: int, *, base: float, end: float, warmup: int, total: int, start: float = 0.0, floor: float = 0.0
) -> float:
    """Learning rate: linear from `start` at step 0 to `base` at step `warmup`, then half a cosine to `end` at step `total`.

    Beyond `total` it stays at `end`; after the warm-up it is at least `floor`. With start 0, step 0 of a warm-up has rate
    exactly 0, as in the published training of RAR.
    """
    if step < warmup:
        return start + (base - start) * step / warmup
    return max(floor, end if step >= total else cosine_between(base, end, (step - warmup) / (total - warmup)))


def inverse_sqrt(step: int, *, peak: float, start: float, warmup: int) -> float:
    """Learning rate of DiGIT's generators: linear from `start` to the peak over `warmup` steps, then peak * sqrt(warmup / step)."""
    return start + (peak - start) * step / warmup if step < warmup else peak * math.sqrt(warmup / step)


def random_ratio(step: int, *, start: int, end: int) -> float:
    """Probability that a training sample is permuted: 1 before step `start`, then linear to 0 at step `end`.

    With start = end the ratio falls from 1 to 0 at that very step, so (0, 0) is pure raster training.
    """
    if step < start:
        return 1.0
    if step >= end:
        return 0.0
    return 1 - (step - start) / (end - start)


def power_cosine(scale: float, power: float, tokens: int) -> npt.NDArray[np.float32]:
    """Guidance weight of each of `tokens` steps: 1 + (scale - 1) * (1 - cos(pi * (step / tokens) ** power)) / 2.

    power 0 is the constant `scale`, step 0 included (0 ** 0 = 1). Raises ValueError for a negative scale or power.
    """
    if scale < 0 or power < 0:
        raise ValueError(f"guidance scale {scale} and power {power} must not be negative")
    share = (np.arange(tokens, dtype=np.float64) / tokens) ** power
    return (1 + (scale - 1) * 0.5 * (1 - np.cos(np.pi * share))).astype(np.float32)


def warmup_plateau_linear(step: int, *, peak: float, start: float, end: float, warmup: int, total: int) -> float:
    """Learning rate of the Llama-style generators: warm-up, plateau, decay; `start` and `end` are shares of the peak.

    Linear from start to the peak over `warmup` steps, the peak for 5 % of what remains, then linear to `end` at the
    last step, total - 1.
    """
    if step < warmup:
        return peak * (start + (1 - start) * step / warmup)
    share = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    if share < PLATEAU:
        return peak
    return peak * (end + (1 - end) * (1 - share) / (1 - PLATEAU))
