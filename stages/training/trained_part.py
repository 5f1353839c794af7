"""A part while it is trained: its module wrapped for replicas, its optimizer, its averaged weights, and their state by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stages.training.config import AdamW, TrainingConfig
from stages.training.replicas import Replicas
from stages.training.task import Part

State = dict[str, Tensor]
MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # of a parameter, in torch's optimizers
DECAYS = "decays"  # of a group: whether weight decay applies to it


class Average:
    """Averaged copies of all trainable parameters, updated after every step.

    warms_up: the decay rises to its value as (1 + step) / (10 + step): otherwise the first weights would dominate the
    average of a short training.
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


def build_optimizer(part: Part) -> torch.optim.Optimizer:
    """The config's optimizer over the part's trainable parameters: one group that decays, one that does not."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in part.module.named_parameters():
        if parameter.requires_grad:
            groups[part.optimizer.decays == "all" or part.is_decayed(name, parameter)].append(parameter)
    some = [{"params": found, DECAYS: decays} for decays, found in groups.items() if found]
    optimizer: torch.optim.Optimizer
    if isinstance(part.optimizer, AdamW):
        optimizer = torch.optim.AdamW(some, betas=part.optimizer.betas, eps=part.optimizer.eps, fused=True)
    else:
        optimizer = torch.optim.SGD(some, momentum=part.optimizer.momentum, fused=True)
    set_step(optimizer, rate=part.optimizer.learning_rate, decay=part.optimizer.weight_decay)
    return optimizer


def set_step(optimizer: torch.optim.Optimizer, *, rate: float, decay: float) -> None:
    """Set learning rate and weight decay of the next step."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = rate, decay if group[DECAYS] else 0.0


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters in the optimizer's order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class TrainedPart:
    """A part while it is trained: its module wrapped for replicas, its optimizer, its average."""

    def __init__(self, part: Part, config: TrainingConfig, replicas: Replicas):
        self.part = part
        self.wrapped = replicas.wrap(part.module)
        self.optimizer = build_optimizer(part)
        self.parameters = parameters_of(self.optimizer)
        self.names = {id(parameter): name for name, parameter in part.module.named_parameters()}
        self.average = None if config.ema is None else Average(part.module, config.ema, warms_up=config.ema_warmup)

    def rates(self, step: int, steps: int) -> dict[str, float]:
        """Scheduled values of the present step, by name."""
        optimizer = self.part.optimizer
        rates = {"learning_rate": self.part.schedule.rate(step, base=optimizer.learning_rate, steps=steps)}
        is_constant = optimizer.weight_decay_end is None
        return rates if is_constant else rates | {"weight_decay": optimizer.decay(step, steps=steps)}

    def update(self, step: int, steps: int) -> None:
        """Move the parameters by their gradients, with learning rate and weight decay of this step."""
        rate = self.rates(step, steps)["learning_rate"]
        set_step(self.optimizer, rate=rate, decay=self.part.optimizer.decay(step, steps=steps))
        self.optimizer.step()

    def state(self) -> State:
        name = self.part.name
        state = {f"model.{name}.{key}": tensor for key, tensor in self.part.module.state_dict().items()}
        for parameter, moments in self.optimizer.state.items():
            state |= {f"optimizer.{name}.{self.names[id(parameter)]}.{key}": value for key, value in moments.items()}
        if self.average is not None:
            state |= {f"average.{name}.{key}": tensor for key, tensor in self.average.tensors.items()}
        return state

    def load(self, state: State) -> None:
        """Load a state of the same names and shapes."""
        name = self.part.name
        self.part.module.load_state_dict(part_of(state, f"model.{name}."))
        moments = part_of(state, f"optimizer.{name}.")
        known = self.optimizer.state_dict()
        known["state"] = {
            place: own
            for place, parameter in enumerate(self.parameters)
            if (own := _moments_of(moments, self.names[id(parameter)]))
        }
        self.optimizer.load_state_dict(known)
        if self.average is not None:
            for key, tensor in part_of(state, f"average.{name}.").items():
                self.average.tensors[key].copy_(tensor)


def _moments_of(moments: State, name: str) -> dict[str, Any]:
    """Optimizer state of one parameter, in memory of torch's own (a mapped file may be aligned otherwise)."""
    found = {key: moments.get(f"{name}.{key}") for key in MOMENTS}
    return {key: tensor.clone() for key, tensor in found.items() if tensor is not None}


def part_of(state: Mapping[str, Tensor], prefix: str) -> State:
    """Tensors whose name begins with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
