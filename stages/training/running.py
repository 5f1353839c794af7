"""A part of a training while it runs: wrapped for replicas, with optimizer and average, and its state by name."""

from __future__ import annotations

from typing import Any

from stages.training import checkpoints
from stages.training.average import Average
from stages.training.config import TrainingConfig
from stages.training.optimizers import build_optimizer, parameters_of, set_step
from stages.training.replicas import Replicas
from stages.training.task import Part


class Running:
    """A part while it is trained: its module wrapped for replicas, its optimizer, its average."""

    def __init__(self, part: Part, config: TrainingConfig, replicas: Replicas):
        self.part = part
        self.wrapped = replicas.wrap(part.module)
        self.optimizer = build_optimizer(part)
        self.parameters = parameters_of(self.optimizer)
        self.names = {id(parameter): name for name, parameter in part.module.named_parameters()}
        self.average = None if config.ema is None else Average(part.module, config.ema, warms_up=config.ema_warmup)

    def rate(self, step: int, steps: int) -> float:
        return self.part.schedule.rate(step, base=self.part.optimizer.learning_rate, steps=steps)

    def update(self, step: int, steps: int) -> None:
        """Move the parameters by their gradients, with learning rate and weight decay of this step."""
        set_step(self.optimizer, rate=self.rate(step, steps), decay=self.part.optimizer.decay(step, steps=steps))
        self.optimizer.step()

    def state(self) -> checkpoints.State:
        name = self.part.name
        state = {f"model.{name}.{key}": tensor for key, tensor in self.part.module.state_dict().items()}
        for parameter, moments in self.optimizer.state.items():
            state |= {f"optimizer.{name}.{self.names[id(parameter)]}.{key}": value for key, value in moments.items()}
        if self.average is not None:
            state |= {f"average.{name}.{key}": tensor for key, tensor in self.average.tensors.items()}
        return state

    def load(self, state: checkpoints.State) -> None:
        """Take over a state that fits."""
        name = self.part.name
        self.part.module.load_state_dict(checkpoints.part_of(state, f"model.{name}."))
        moments = checkpoints.part_of(state, f"optimizer.{name}.")
        known = self.optimizer.state_dict()
        known["state"] = {
            place: own
            for place, parameter in enumerate(self.parameters)
            if (own := _moments_of(moments, self.names[id(parameter)]))
        }
        self.optimizer.load_state_dict(known)
        if self.average is not None:
            for key, tensor in checkpoints.part_of(state, f"average.{name}.").items():
                self.average.tensors[key].copy_(tensor)


def _moments_of(moments: checkpoints.State, name: str) -> dict[str, Any]:
    """Optimizer state of one parameter, in memory of torch's own (a mapped file may be aligned otherwise)."""
    found = {key: moments.get(f"{name}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
    return {key: tensor.clone() for key, tensor in found.items() if tensor is not None}
