"""From a part's config to torch's optimizer, with fused kernels."""

from __future__ import annotations

import torch
from torch import nn

from stages.training.task import Part

DECAYS = "decays"  # of a group: whether weight decay applies to it


def build_optimizer(part: Part) -> torch.optim.Optimizer:
    """AdamW over the part's trainable parameters: one group that decays, one that does not."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in part.module.named_parameters():
        if parameter.requires_grad:
            groups[part.optimizer.decays == "all" or part.is_decayed(name, parameter)].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": found, DECAYS: decays} for decays, found in groups.items() if found],
        betas=part.optimizer.betas,
        eps=part.optimizer.eps,
        fused=True,
    )
    set_step(optimizer, rate=part.optimizer.learning_rate, decay=part.optimizer.weight_decay)
    return optimizer


def set_step(optimizer: torch.optim.Optimizer, *, rate: float, decay: float) -> None:
    """Set learning rate and weight decay of the next step."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = rate, decay if group[DECAYS] else 0.0


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters in the optimizer's order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
