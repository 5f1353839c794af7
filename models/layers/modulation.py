"""Adaptive layer norm: shift, scale and gate as linear functions of a condition."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn


def modulation(width: int, parts: int) -> nn.Sequential:
    """A linear map from an activated condition (..., width) to `parts` modulations (..., parts * width).

    The SiLU before it is applied once for all blocks by the network. Published files count it as member 0,
    hence the name "1" of the only member here.
    """
    return nn.Sequential(OrderedDict({"1": nn.Linear(width, parts * width)}))


def modulate(x: Tensor, *, scale: Tensor, shift: Tensor) -> Tensor:
    return x * (1 + scale) + shift
