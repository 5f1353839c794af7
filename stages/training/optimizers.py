"""From a part's config to torch's optimizer, with fused kernels."""

from __future__ import annotations

import torch
from torch import nn

from stages.training.task import Part


def build_optimizer(part: Part) -> torch.optim.Optimizer:
    """AdamW over the part's trainable parameters: one group that decays, one that does not."""
    named = [(name, one) for name, one in part.module.named_parameters() if one.requires_grad]
    decayed = [one for name, one in named if part.is_decayed(name, one)]
    others = [one for name, one in named if not part.is_decayed(name, one)]
    groups = [
        {"params": decayed, "weight_decay": part.optimizer.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=part.optimizer.learning_rate,
        betas=part.optimizer.betas,
        eps=part.optimizer.eps,
        fused=True,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters in the optimizer's order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
