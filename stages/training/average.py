"""Exponential moving average of a module's parameters; buffers are not averaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """Averaged copies of all trainable parameters, updated after every step.

    warms_up: the decay rises to its value with the steps, as (1 + step) / (10 + step): else a short training's average
    would be full of the first weights.
    """

    def __init__(self, module: nn.Module, decay: float, *, warms_up: bool):
        self.decay, self.warms_up = decay, warms_up
        self._parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}
        self.tensors = {name: one.detach().clone() for name, one in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move every average by 1 - decay towards its parameter, after `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warms_up else self.decay
        torch._foreach_lerp_(list(self.tensors.values()), list(self._parameters.values()), 1 - decay)

    @torch.no_grad()
    def put(self) -> None:
        """Overwrite the parameters with their averages."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this block the module holds the averages."""
        before: dict[str, Tensor] = {name: one.detach().clone() for name, one in self._parameters.items()}
        self.put()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(before[name])
