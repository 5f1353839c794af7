"""Exponential moving average of a module's parameters; buffers are not averaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """Averaged copies of all trainable parameters, updated after every step with a fixed decay."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self._parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}
        self.tensors = {name: one.detach().clone() for name, one in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move every average by 1 - decay towards its parameter."""
        torch._foreach_lerp_(list(self.tensors.values()), list(self._parameters.values()), 1 - self.decay)

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
